"""Rejection sampling: answer each prompt several times, keep the best answer, fine-tune on those (RAFT, best of n).

    accelerate launch recipes/best_of_n.py --model_name_or_path outputs/sft
    accelerate launch recipes/best_of_n.py --model_name_or_path outputs/sft --rounds 3 --num_generations 16
    accelerate launch recipes/best_of_n.py --model_name_or_path outputs/sft --reward_model outputs/reward

To make it yours, edit DEFAULTS, `to_prompt` and `reward`. In output_dir: the tuned model of each round in round_1,
round_2, …; what was kept in rows/round_1.jsonl, and its pairs for recipes/dpo.py in rows/round_1_pairs.jsonl.
"""

from alignment.config import RewardArguments, parse
from alignment.data import load_splits
from alignment.rewards import verify

DEFAULTS = dict(
    # What is sampled from, and for which prompts. It wants a model that already answers: the one recipes/sft.py left
    model_name_or_path="data/tiny/model",
    data=["data/tiny/prompts"],
    output_dir="outputs/best_of_n",
    # How many answers, and which are good enough: 1.0 keeps the answers that are right
    num_generations=8,
    temperature=1.0,
    max_completion_length=32,
    min_reward=1.0,
    rounds=1,
    # How it is tuned on what was kept: as in recipes/sft.py, a gentler rate
    peft="none",
    learning_rate=5e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    assistant_only_loss=True,
    packing=True,
    max_length=256,
    per_device_train_batch_size=8,
    num_train_epochs=1,
    eval_strategy="epoch",
    eval_on_start=True,
    logging_steps=5,
    save_strategy="no",
    gradient_checkpointing=False,
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
    """Read the arguments; in each round sample, keep the best, train on it."""
    from trl import SFTConfig

    from alignment.best_of_n import SamplingArguments, rounds
    from alignment.models import load_model
    from alignment.online import reward_functions
    from alignment.run import run
    from alignment.tokenization import tokenize
    from alignment.trainers import SFTTrainer

    args = parse(SFTConfig, DEFAULTS, also=(RewardArguments, SamplingArguments))
    prompts = load_splits(args, "prompt", to_prompt)
    for turn in rounds(args, prompts, reward_functions([reward], args)):
        splits = load_splits(turn, "sft")
        loaded = load_model(turn)
        rows = tokenize(splits, loaded, turn, "sft")
        trainer = SFTTrainer(
            model=loaded.model,
            args=turn.train,
            train_dataset=rows.train,
            eval_dataset=rows.test,
            processing_class=loaded.tokenizer,
            peft_config=loaded.peft_config,
        )
        run(trainer, turn, loaded, rows)


if __name__ == "__main__":
    main()
