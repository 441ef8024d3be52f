"""Supervised fine-tuning: teach a model to answer, from conversations.

    accelerate launch recipes/sft.py                                    # the embedded model, about a minute on a CPU
    accelerate launch recipes/sft.py --model_name_or_path Qwen/Qwen3-0.6B --peft lora --data mine.jsonl
    accelerate launch recipes/sft.py --dry_run                          # look at rows, masks and memory, train nothing

To make it yours, edit DEFAULTS and `to_chat`, or give a YAML with the same keys: --config mine.yaml.
Then measure what it did: accelerate launch eval/generate.py --model outputs/sft --data data/tiny/prompts
"""

from alignment.config import parse
from alignment.data import load_splits

DEFAULTS = dict(
    # What is trained, on what
    model_name_or_path="data/tiny/model",
    data=["data/tiny/chat"],
    output_dir="outputs/sft",
    # How: every weight. --peft lora trains one in a hundred and wants about ten times the learning rate
    peft="none",
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # below 1: a share of all steps
    assistant_only_loss=True,  # false trains on what the user said, too
    # How much: rows are packed to max_length, so 8 rows of 256 tokens are about 60 short conversations
    packing=True,
    max_length=256,
    per_device_train_batch_size=8,
    num_train_epochs=2,
    # What is looked at, and what is kept
    eval_strategy="steps",
    eval_steps=0.25,
    eval_on_start=True,
    logging_steps=5,
    save_strategy="epoch",
    save_total_limit=1,
    gradient_checkpointing=False,  # true: less memory, a fifth slower
    train_sampling_strategy="group_by_length",  # where rows are not packed
    report_to="none",
    seed=42,
)


def to_chat(row):
    """Return {"messages": [...]}, {"prompt": str, "completion": str} or {"text": str} for one row of the data."""
    return row


def main():
    """Read the arguments, load rows and model, train."""
    from trl import SFTConfig

    from alignment.models import load_model
    from alignment.run import run
    from alignment.tokenization import tokenize
    from alignment.trainers import SFTTrainer

    args = parse(SFTConfig, DEFAULTS)
    splits = load_splits(args, "sft", to_chat)
    loaded = load_model(args)
    rows = tokenize(splits, loaded, args, "sft")
    trainer = SFTTrainer(
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
