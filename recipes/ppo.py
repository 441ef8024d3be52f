"""Proximal Policy Optimisation: sample answers, reward them, let a critic say which token made the difference.

    accelerate launch recipes/ppo.py                  # the embedded base learns to answer, and to stop
    accelerate launch recipes/ppo.py --model_name_or_path outputs/sft --data data/tiny/prompts --peft lora
    accelerate launch recipes/ppo.py --dry_run        # rehearse: do the rewards tell answers apart?

To make it yours, edit DEFAULTS, `to_prompt` and `reward`, or give a YAML with the same keys: --config mine.yaml.
Then measure what it did: accelerate launch eval/generate.py --model outputs/ppo --data data/tiny/questions
"""

from alignment.config import RewardArguments, parse
from alignment.data import load_splits
from alignment.rewards import verify

DEFAULTS = dict(
    # What is trained, on what. The model has to be right now and then: a base is, in its own layout
    model_name_or_path="data/tiny/model",
    data=["data/tiny/questions"],
    output_dir="outputs/ppo",
    # How: every weight; a second model is the critic, a third the reference. --peft lora has one backbone for all
    peft="none",
    learning_rate=2e-4,
    critic_learning_rate=1e-3,
    lr_scheduler_type="constant",
    # The pull back towards the reference, and how far an update may go
    kl_coef=0.02,
    cliprange=0.2,
    vf_coef=0.5,
    missing_eos_penalty=0.2,  # taken off the reward of an answer that is cut
    # How answers are sampled
    max_completion_length=24,
    temperature=1.0,
    # How much: rollouts of 256 answers, 8 to each of 32 prompts, seen once in two updates
    num_generations=8,
    per_device_train_batch_size=128,
    steps_per_generation=2,
    num_iterations=1,  # more: fewer answers to sample, and sooner learnt by heart
    max_steps=80,
    # What is looked at, and what is kept: one answer to each held-out prompt
    num_generations_eval=1,
    per_device_eval_batch_size=200,
    eval_strategy="steps",
    eval_steps=0.5,
    eval_on_start=True,
    logging_steps=4,
    num_completions_log_steps=50,
    save_strategy="no",
    save_total_limit=1,
    gradient_checkpointing=False,  # true: less memory, a fifth slower
    report_to="none",
    seed=42,
)


def to_prompt(row):
    """Return {"prompt": a list of chat messages, or a text} and the columns that `reward` reads."""
    return row


def reward(completions, verifier, answer, **columns):
    """Return what each answer is worth: 1 where it is right by its row's own verifier."""
    return verify(completions, verifier, answer)


def main():
    """Read the arguments, load prompts and model, train."""
    from alignment.models import load_model
    from alignment.online import reward_functions
    from alignment.ppo import PPOConfig, PPOTrainer
    from alignment.run import run
    from alignment.tokenization import load_texts, tokenize

    args = parse(PPOConfig, DEFAULTS, also=(RewardArguments,))
    splits = load_splits(args, "prompt", to_prompt)
    loaded = load_model(args)
    rows = tokenize(splits, loaded, args, "prompt")
    trainer = PPOTrainer(
        model=loaded.model,
        reward_funcs=reward_functions([reward], args),  # and the one of --reward_model
        args=args.train,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        text_dataset=load_texts(args, loaded),  # of --text_data: what is not to be forgotten (--ptx_coef)
        processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config,
    )
    run(trainer, args, loaded, rows)


if __name__ == "__main__":
    main()
