"""A reward model from preference pairs: one score an answer, higher for the chosen one (Bradley-Terry).

    accelerate launch recipes/reward.py                                  # the embedded model, about a minute on a CPU
    accelerate launch recipes/reward.py --model_name_or_path outputs/sft --peft lora
    accelerate launch recipes/reward.py --dry_run

To make it yours, edit DEFAULTS and `to_pair`, or give a YAML with the same keys: --config mine.yaml.
Its held-out pair accuracy is printed at the end, and is in outputs/reward/run.json.
"""

from alignment.config import parse
from alignment.data import load_splits

DEFAULTS = dict(
    # What is trained, on what
    model_name_or_path="data/tiny/model",
    data=["data/tiny/preferences"],
    output_dir="outputs/reward",
    # How: every weight, and a new head for the score
    peft="none",
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # below 1: a share of all steps
    center_rewards_coefficient=0.01,  # keeps the mean score near 0, so that scores of two runs can be compared
    # How much: 16 pairs an update
    max_length=256,
    per_device_train_batch_size=16,
    num_train_epochs=2,
    # What is looked at, and what is kept
    eval_strategy="steps",
    eval_steps=0.5,
    eval_on_start=True,
    logging_steps=5,
    save_strategy="epoch",
    save_total_limit=1,
    gradient_checkpointing=False,  # true: less memory, a fifth slower
    train_sampling_strategy="group_by_length",  # pairs of like lengths together: less padding
    report_to="none",
    seed=42,
)


def to_pair(row):
    """Return {"prompt", "chosen", "rejected"}: lists of chat messages, or three strings."""
    return row


def main():
    """Read the arguments, load pairs and model, train."""
    from trl import RewardConfig

    from alignment.models import load_model
    from alignment.run import run
    from alignment.tokenization import tokenize
    from alignment.trainers import RewardTrainer

    args = parse(RewardConfig, DEFAULTS)
    splits = load_splits(args, "preference", to_pair)
    loaded = load_model(args, head="sequence")
    rows = tokenize(splits, loaded, args, "reward")
    trainer = RewardTrainer(
        model=loaded.model,
        args=args.train,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config,
    )
    run(trainer, args, loaded, rows)


if __name__ == "__main__":
    main()
