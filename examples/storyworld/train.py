"""Trains the story world's tokenizer and model and writes them as a Hugging Face checkpoint.

A Llama of four million weights reads freshly written stories, each once, so the training loss is an unbiased estimate
of the held-out loss. Hidden matrices are stepped by Muon (momentum made orthogonal, Jordan 2024), the embedding and the
norms by AdamW. Forward and backward run on a bfloat16 copy of the float32 weights, a fifth faster than autocast.

A row holds whole stories, the last one cut: a story that starts in the middle would ask what cannot be known.
Left out: validation during training (no story is seen twice) and resuming (a run takes less than an hour).
"""

import argparse
import copy
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB = 512
# Share of the steps with long rows, and of those over which the rate falls to zero.
LONG, COOL = 0.12, 0.5
# In whole stories 1 token in 50 shows that questions can be answered, and after 3.5 M tokens of them (1 M of drills)
# the model still guessed places. So the run begins with stories of one or two entities, where copying a place is right
# more often than not, goes on to drills, which ask after every event or so, and reaches whole stories by the middle.
DRILL = world.Pace(first=(0, 3, 0.5), later=(0, 2, 0.4), more=0.92, turns=16)
FEW = dataclasses.replace(DRILL, people={1: 3, 2: 1}, things={0: 2, 1: 1}, animals={0: 2, 1: 1}, turns=8)
FEW_SHARE, DRILL_SHARE, DRILL_WEIGHT = 0.2, 0.5, 5.0
# A system message is the beginning of the story, a user's is the rest of the line up to the question.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['content'] | trim | replace('\\n', ' ') }}{{ ' ' if message['role'] == 'system' else '\\n' }}"
    "{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token for nearly every word; <s> goes in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((s.text for s in world.stories("tokenizer", 5000)), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """Every width is a multiple of 128, so that groups of 32, 64 and 128 fit. Float32."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def falling(step: int, steps: int, share: float) -> float:
    """From 1 to 0 over the first `share` of the run."""
    return max(0.0, 1 - step / (share * steps))


def batches(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The token blocks of a run, int64. The first story of a row follows <s>, a later one </s><s> or nothing.

    The last blocks hold a quarter of the rows at four times the length: most stories fit 256 tokens, and attention
    over the whole context of 1024 costs the CPU three times as much for the same number of tokens.
    """
    rng = random.Random(f"train {args.seed}")
    for step in range(args.steps):
        long = 4 if step >= (1 - LONG) * args.steps else 1
        rows, length, block = args.rows // long, args.length * long, []
        few, drills = (falling(step, args.steps, share) for share in (FEW_SHARE, DRILL_SHARE))

        def tell(few: float = few, drills: float = drills) -> str:
            chance = rng.random()
            return world.sample(rng, FEW if chance < few else DRILL if chance < drills else world.STORY).text

        for _ in range(rows):
            text = BOS + tell()
            # A token has 3.7 characters: these are enough stories for a row.
            while len(text) < 5 * length:
                text += rng.choice(("", EOS + BOS)) + tell()
            block.append(text)
        ids = tokenizer(block, add_special_tokens=False)["input_ids"]
        yield torch.tensor([row[:length] for row in ids])


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An answer ends with its line, so a newline ends generation as </s> does."""
    half = copy.deepcopy(model).half()
    stops = [tokenizer.eos_token_id, tokenizer("\n", add_special_tokens=False)["input_ids"][0]]
    half.config.eos_token_id = stops
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # The name that transformers 4 and 5 both know.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def update(model: LlamaForCausalLM, work: LlamaForCausalLM, opts: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of the float32 `model` by the gradients of its bfloat16 copy, which follows."""
    pairs = list(zip(model.parameters(), work.parameters(), strict=True))
    for master, copied in pairs:
        assert copied.grad is not None
        master.grad, copied.grad = copied.grad.float(), None
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = rate
        opt.step()
    for master, copied in pairs:
        copied.data.copy_(master.data)


def in_answer(ids: torch.Tensor, question_mark: int, newline: int) -> torch.Tensor:
    """Which tokens lie between a question mark and the end of the answer's line. ids and result [rows, length]."""
    at = torch.arange(ids.shape[1]).expand_as(ids)
    asked = torch.where(ids == question_mark, at, -1).cummax(1).values
    ends = (ids == newline) & (ids.roll(1, 1) != question_mark)
    return asked > torch.where(ends, at, -1).cummax(1).values


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.layers)
    work = copy.deepcopy(model).bfloat16()
    opts = optimizers(model, args.lr)
    marks = [tokenizer(mark, add_special_tokens=False)["input_ids"][0] for mark in ("?", "\n")]
    start, seen, losses = time.time(), 0, list[float]()
    try:
        for step, ids in enumerate(batches(tokenizer, args)):
            loss = F.cross_entropy(
                work(input_ids=ids).logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
            )
            weight = 1 + (DRILL_WEIGHT - 1) * falling(step, args.steps, DRILL_SHARE) * in_answer(ids, *marks)[:, 1:]
            ((weight * loss).sum() / weight.sum()).backward()
            rate = args.lr * min(1.0, (step + 1) / args.warmup, (args.steps - step) / (COOL * args.steps))
            update(model, work, opts, rate)
            losses.append(loss.mean().item())
            seen += ids.numel()
            if (step + 1) % 20 == 0:
                mean = sum(losses[-20:]) / 20
                print(
                    f"step {step + 1}: {mean:.4f} nats/token, {seen / 1e6:.2f} M tokens, {time.time() - start:.0f} s",
                    flush=True,
                )
            if (step + 1) % args.save_every == 0:
                save(model, tokenizer, args.out)
    except KeyboardInterrupt:
        print("interrupted: writing the model as it is")
    save(model, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
