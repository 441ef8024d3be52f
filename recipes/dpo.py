"""Direct Preference Optimisation: teach a tuned model to prefer the chosen answer of each pair.

    accelerate launch recipes/dpo.py --model_name_or_path outputs/sft    # on top of what recipes/sft.py left
    accelerate launch recipes/dpo.py --peft lora --beta 0.05 --loss_type ipo
    accelerate launch recipes/dpo.py --dry_run                           # is the reference right? look before training

To make it yours, edit DEFAULTS and `to_pair`, or give a YAML with the same keys: --config mine.yaml.
Then measure what it did: accelerate launch eval/generate.py --model outputs/dpo --data data/tiny/prompts
"""

from alignment.config import parse
from alignment.data import load_splits

DEFAULTS = dict(
    # What is trained, on what. DPO wants a model that already answers: give the one recipes/sft.py left
    model_name_or_path="data/tiny/model",
    data=["data/tiny/preferences"],
    output_dir="outputs/dpo",
    # How: every weight, with the model as it starts as the reference
    peft="none",
    learning_rate=5e-5,  # on the embedded model 2e-4 unlearns right answers
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # below 1: a share of all steps
    beta=0.1,  # the pull back towards the reference; smaller lets the policy move further
    # How much: 16 pairs an update
    max_length=256,
    per_device_train_batch_size=16,
    num_train_epochs=1,
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
    from trl import DPOConfig

    from alignment.models import load_model
    from alignment.run import run
    from alignment.tokenization import tokenize
    from alignment.trainers import DPOTrainer

    args = parse(DPOConfig, DEFAULTS)
    splits = load_splits(args, "preference", to_pair)
    loaded = load_model(args)
    rows = tokenize(splits, loaded, args, "dpo")
    trainer = DPOTrainer(
        model=loaded.model,
        ref_model=loaded.ref_model,  # None: the trainer keeps the model as it starts
        args=args.train,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config,
    )
    run(trainer, args, loaded, rows)


if __name__ == "__main__":
    main()
