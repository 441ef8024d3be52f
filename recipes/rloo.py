"""REINFORCE leave-one-out: sample answers, reward them, compare each with the mean of its siblings.

    accelerate launch recipes/rloo.py                 # the embedded base learns to answer, and to stop
    accelerate launch recipes/rloo.py --model_name_or_path outputs/sft --data data/tiny/prompts --peft lora
    accelerate launch recipes/rloo.py --dry_run       # rehearse: do the rewards tell answers apart?

To make it yours, edit DEFAULTS, `to_prompt` and `reward`, or give a YAML with the same keys: --config mine.yaml.
Then measure what it did: accelerate launch eval/generate.py --model outputs/rloo --data data/tiny/questions
"""

from alignment.config import RewardArguments, parse
from alignment.data import load_splits
from alignment.rewards import verify

DEFAULTS = dict(
    # What is trained, on what. The model has to be right now and then: a base is, in its own layout
    model_name_or_path="data/tiny/model",
    data=["data/tiny/questions"],
    output_dir="outputs/rloo",
    # How: every weight. --peft lora and qlora take the base model as the reference
    peft="none",
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    beta=0.02,  # the pull back towards the reference, a part of the reward
    # How answers are sampled: a group of them for each prompt
    num_generations=16,
    max_completion_length=24,
    temperature=1.0,
    disable_dropout=True,  # the weights that learn are those that sampled
    # How much: 8 prompts x 16 answers an update
    per_device_train_batch_size=128,
    num_train_epochs=0.32,  # 80 updates of the embedded questions
    # What is looked at, and what is kept: one answer to each held-out prompt
    num_generations_eval=1,
    per_device_eval_batch_size=200,
    eval_strategy="steps",
    eval_steps=0.5,
    eval_on_start=True,
    logging_steps=5,
    save_strategy="no",
    save_total_limit=1,
    gradient_checkpointing=False,  # true: less memory, a fifth slower
    report_to="none",
    seed=42,
)


def to_prompt(row):
    """Return {"prompt": a list of chat messages, or a text} and the columns that `reward` reads."""
    return row


def reward(completions, verifier, answer, ended, **columns):
    """Return what each answer is worth: right by its row's own verifier, less a little where it did not end."""
    return [right - 0.2 * (not end) for right, end in zip(verify(completions, verifier, answer), ended, strict=True)]


def main():
    """Read the arguments, load prompts and model, train."""
    from trl import RLOOConfig

    from alignment.models import load_model
    from alignment.online import RLOOTrainer, reward_functions
    from alignment.run import run
    from alignment.tokenization import tokenize

    args = parse(RLOOConfig, DEFAULTS, also=(RewardArguments,))
    splits = load_splits(args, "prompt", to_prompt)
    loaded = load_model(args)
    rows = tokenize(splits, loaded, args, "prompt")
    trainer = RLOOTrainer(
        model=loaded.model,
        ref_model=loaded.ref_model,  # None: the trainer loads the model as it starts, where beta asks for one
        reward_funcs=reward_functions([reward], args),  # and the one of --reward_model
        args=args.train,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config,
    )
    run(trainer, args, loaded, rows)


if __name__ == "__main__":
    main()
