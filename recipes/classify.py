"""Labels for texts, pairs and words, or answers found in a text: encoders (BERT) and decoders, a new head on top.

    accelerate launch recipes/classify.py                                # the embedded model, about a minute on a CPU
    accelerate launch recipes/classify.py --data data/tiny/sentence_pairs --peft lora
    accelerate launch recipes/classify.py --dry_run

To make it yours, edit DEFAULTS and `to_row`, or give a YAML with the same keys: --config mine.yaml. --task names one of
GLUE's tasks, --head token reads words with BIO tags, --head span questions with answers in a context (SQuAD).
The metrics of the held-out rows are printed at the end, and are in outputs/classify/run.json.
"""

from alignment.config import parse
from alignment.labels import load_labelled

DEFAULTS = dict(
    # What is trained, on what
    model_name_or_path="data/tiny/model",
    data=["data/tiny/sentences"],
    output_dir="outputs/classify",
    head="sequence",  # token: a label a word; span: first and last token of an answer
    # How: every weight, and a new head
    peft="none",
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    warmup_steps=0.05,  # below 1: a share of all steps
    # How much: 32 rows an update
    max_length=256,
    on_long_row="cut",  # its label still stands for what is left; drop and stop are the other ways
    per_device_train_batch_size=32,
    per_device_eval_batch_size=64,
    num_train_epochs=3,
    # What is looked at, and what is kept
    eval_strategy="epoch",
    eval_on_start=True,
    logging_steps=10,
    save_strategy="epoch",
    save_total_limit=1,
    gradient_checkpointing=False,  # true: less memory, a fifth slower
    report_to="none",
    seed=42,
)


def to_row(row):
    """Return {"text", "label"} and maybe "text_pair"; {"tokens", "tags"}; or {"question", "context", "answers"}."""
    return row


def main():
    """Read the arguments, load rows and model, train."""
    from alignment.classifier import ClassificationTrainer, ClassifyConfig
    from alignment.classifying import encode
    from alignment.models import load_model
    from alignment.run import run

    args = parse(ClassifyConfig, DEFAULTS)
    splits, labels = load_labelled(args, to_row)
    loaded = load_model(args, head=labels.head, labels=labels.outputs)
    rows = encode(splits, loaded, args, labels)
    trainer = ClassificationTrainer(
        model=loaded.model,
        args=args.train,
        labels=labels,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config,
    )
    run(trainer, args, loaded, rows)


if __name__ == "__main__":
    main()
