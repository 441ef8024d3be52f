"""PPO against TRL's last one (trl 1.12, trl.experimental.ppo): seconds per 1,000 answers, peak memory, reward reached.

    python benchmarks/ppo.py --model outputs/sft                   # an SFT model: python recipes/sft.py
    python benchmarks/ppo.py --model outputs/sft --answers 1024 --max_new_tokens 53
    python benchmarks/ppo.py --memory                              # one shared backbone against separate models

Both train the same model on the same prompts with the same reward function, the same number of answers, epochs and
minibatches, in float32, one after the other, each in a process of its own. TRL 1.12 gets a virtual environment of its
own, made here in front of the installed stack (torch, transformers, accelerate and peft are the same files for both).
--memory trains a random Llama of 85 M parameters once with LoRA (policy, critic and reference on one backbone) and once
in full (a model each). --output writes JSON, too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TRL = "1.12.0"
ROLLOUT, MINIBATCHES, EPOCHS = 64, 4, 4


def environment(folder: Path) -> Path:
    """Make an environment with TRL 1.12 in front of what is installed here; return its interpreter."""
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if not (site / f"trl-{TRL}.dist-info").is_dir():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site / "stack.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, f"trl=={TRL}"]
        subprocess.run(pip, check=True)
    return python


def prompts(tokenizer, split):
    """Return the embedded prompts, encoded, and their rows by their token ids."""
    lines = (ROOT / "data" / "tiny" / "prompts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["prompt_ids"] = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    return rows, {tuple(row["prompt_ids"]): row for row in rows}


def held_out(model, tokenizer, args):
    """Return the share of right greedy answers to the held-out prompts."""
    from alignment.generation import Decoding, generate_answers
    from alignment.rewards import verify

    rows, _ = prompts(tokenizer, "test")
    found = generate_answers(model.eval(), tokenizer, [r["prompt"] for r in rows], Decoding(args.max_new_tokens))
    columns = [[row[name] for row in rows] for name in ("verifier", "answer")]
    return sum(verify([answer.text for answer in found], *columns)) / len(rows)


def ours(args, folder):
    """Train with alignment.ppo; return (trainer, the policy, scores of the rollouts)."""
    from datasets import Dataset

    from alignment.checkpoints import load_base, load_tokenizer
    from alignment.ppo import PPOConfig, PPOTrainer
    from alignment.rewards import verify

    def reward(completions, verifier, answer, **columns):
        return verify(completions, verifier, answer)

    tokenizer, (model, _) = load_tokenizer(args.model), load_base(args.model)
    rows, _ = prompts(tokenizer, "train")
    config = PPOConfig(
        folder, per_device_train_batch_size=ROLLOUT // MINIBATCHES, steps_per_generation=MINIBATCHES,
        num_iterations=EPOCHS, max_steps=args.answers // ROLLOUT * MINIBATCHES * EPOCHS,
        max_completion_length=args.max_new_tokens, temperature=1.0, learning_rate=args.learning_rate,
        lr_scheduler_type="constant", missing_eos_penalty=1.0, vf_coef=0.1, kl_coef=0.05, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False, disable_tqdm=True,
        activation_checkpointing=False, seed=args.seed,
    )  # fmt: skip
    trainer = PPOTrainer(model, reward, config, Dataset.from_list(rows), processing_class=tokenizer)
    return trainer, model, lambda: [e["reward"] for e in trainer.state.log_history if "reward" in e]


def theirs(args, folder):
    """Train with trl.experimental.ppo; return (trainer, the policy, scores of the rollouts)."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from alignment.checkpoints import load_base, load_tokenizer
    from alignment.rewards import verify

    tokenizer = load_tokenizer(args.model)
    tokenizer.padding_side = "left"
    rows, known = prompts(tokenizer, "train")
    policy, reference = load_base(args.model)[0], load_base(args.model)[0]
    critic, _ = load_base(args.model, "sequence")
    torch.nn.init.zeros_(critic.score.weight)
    means = []

    class Reward(torch.nn.Module):
        """What TRL asks of a reward model: a backbone and a score; here a Python function on the texts."""

        base_model_prefix = "model"

        def model(self, input_ids, attention_mask, **others):
            starts = set(map(len, known))
            found = []
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
                real = [token for token, kept in zip(ids, mask, strict=True) if kept]
                prompt = max((real[:n] for n in starts if tuple(real[:n]) in known), key=len)
                text = tokenizer.decode(real[len(prompt) :], skip_special_tokens=True)
                row = known[tuple(prompt)]
                found.append(verify([text], [row["verifier"]], [row["answer"]])[0])
            means.append(sum(found) / len(found))
            scores = torch.tensor(found)[:, None, None].expand(*input_ids.shape, 1)
            return argparse.Namespace(hidden_states=[scores])

        def score(self, hidden):
            return hidden

    config = PPOConfig(
        folder, per_device_train_batch_size=ROLLOUT // MINIBATCHES, gradient_accumulation_steps=1,
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, total_episodes=args.answers,
        response_length=args.max_new_tokens, temperature=1.0, learning_rate=args.learning_rate, stop_token="eos",
        lr_scheduler_type="constant", missing_eos_penalty=1.0, vf_coef=0.1, kl_coef=0.05, num_sample_generations=0,
        local_rollout_forward_batch_size=ROLLOUT, save_strategy="no", report_to="none", bf16=False,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, seed=args.seed,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in rows])
    trainer = PPOTrainer(
        config, tokenizer, policy, reference, Reward(), data, critic, eval_dataset=data.select(range(64))
    )
    return trainer, policy, lambda: means


def child(args):
    """Run one side and print its figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, policy, scores = (ours if args.child == "ours" else theirs)(args, folder)
        before, began = resident(), time.perf_counter()
        trainer.train()
        seconds, peak = time.perf_counter() - began, resident()
        from alignment.checkpoints import load_tokenizer

        rewards = scores()
        last = rewards[-max(1, len(rewards) // 4) :]
        print(
            "RESULT",
            json.dumps(
                {
                    "answers": args.answers, "seconds": seconds, "seconds_per_1000": 1000 * seconds / args.answers,
                    "peak_mb": peak, "before_mb": before, "first_reward": rewards[0],
                    "last_reward": sum(last) / len(last),
                    "held_out": held_out(policy, load_tokenizer(args.model), args),
                }
            ),
        )  # fmt: skip


def resident():
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_child(args):
    """Train two rollouts of a larger random model, shared or separate, and print the peak."""
    import peft
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignment.checkpoints import load_tokenizer
    from alignment.ppo import PPOConfig, PPOTrainer

    tokenizer = load_tokenizer(args.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    base = resident()
    model = LlamaForCausalLM(config)
    settings = PPOConfig(
        args.folder, per_device_train_batch_size=2, steps_per_generation=2, num_iterations=1, max_steps=4,
        max_completion_length=8, save_strategy="no", report_to="none", bf16=False, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), activation_checkpointing=False,
    )  # fmt: skip
    adapter = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list(prompts(tokenizer, "train")[0][:64])
    trainer = PPOTrainer(
        model, lambda completions, **columns: [0.5] * len(completions), settings, rows, processing_class=tokenizer,
        peft_config=adapter if args.child == "shared" else None,
    )  # fmt: skip
    trainer.train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print("RESULT", json.dumps({"peak_mb": resident() - base, "policy_mb": weights}))


def run(python, kind, args, folder):
    """Run one side in a process of its own; return its figures."""
    command = [python, __file__, "--child", kind, "--folder", folder]
    for name in ("model", "answers", "max_new_tokens", "learning_rate", "seed"):
        command += [f"--{name}", str(vars(args)[name])]
    # the environment of the other has the installed packages, and not what was installed to be edited: this one
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=surroundings)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        sys.exit(f"{kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def main():
    """Read the arguments, run both sides, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data" / "tiny" / "model"))
    parser.add_argument("--answers", type=int, default=1024, help="answers sampled by each side")
    parser.add_argument("--max_new_tokens", type=int, default=53, help="TRL's own default is 53")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--memory", action="store_true", help="measure shared against separate models")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / f"plumbline-trl-{TRL}")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--child", choices=("ours", "trl", "shared", "separate"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return memory_child(args) if args.child in ("shared", "separate") else child(args)
    kinds = ("shared", "separate") if args.memory else ("ours", "trl")
    with tempfile.TemporaryDirectory() as folder:
        found = {
            kind: run(environment(args.venv) if kind == "trl" else sys.executable, kind, args, folder) for kind in kinds
        }
    for name in found[kinds[0]]:
        print(f"{name:>18}" + "".join(f"  {kind} {found[kind][name]:>10.3f}" for kind in kinds))
    key = "peak_mb" if args.memory else "seconds_per_1000"
    print(f"{kinds[1]} / {kinds[0]}, {key}: {found[kinds[1]][key] / found[kinds[0]][key]:.2f}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
