"""Trains the story world's tokenizer and model and writes them as a Hugging Face checkpoint.

A Llama of four million weights reads freshly written stories, each once, so the training loss is an unbiased estimate
of the held-out loss. Hidden matrices are stepped by Muon (momentum made orthogonal, Jordan 2024), the embedding and the
norms by AdamW. Forward and backward run on a bfloat16 copy of the float32 weights, a fifth faster than autocast.

A row holds whole stories, the last one cut: a story that starts in the middle would ask what cannot be known.
Left out: validation during training (no story is seen twice) and resuming (a run takes less than an hour).
"""

import argparse
import copy
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
# The last share of the steps has long rows.
LONG = 0.12
# A run begins with stories of one or two entities and goes over to whole stories; for its first half, what is not an
# answer counts next to nothing: its randomness drowns the gradient of the answers. In a world of three or four people
# and things with a question every five events, places were still guessed after 5 M tokens.
FEW = world.Pace(people={1: 3, 2: 1}, things={0: 2, 1: 1}, animals={0: 2, 1: 1})
LEAST_WEIGHT = 0.01
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
    # Stripped, so that the line ends of an empty line stay two tokens and an answer always ends in the same one.
    tokenizer.train_from_iterator((s.text.strip() for s in world.stories("tokenizer", 5000)), trainer)
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
    model = LlamaForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Starts head h of the first layer as one that attends h + 1 tokens back.

    To say where the cat is, a place must be bound to its subject, four tokens before, and the subject compared with the
    question's. Neither half pays without the other, which is why induction heads appear late and at once (Olsson 2022).
    Given the first half at the start, the second is found in a hundred steps or so.

    Every embedding gets the same large first entry, so that queries and keys have a constant part. With key phases 0
    and query phases -(h + 1) * frequency, rotary attention is largest at that distance. Slow frequencies hardly tell
    neighbours apart, and would only multiply the differences between tokens.
    """
    config, layer, fast = model.config, model.model.layers[0].self_attn, 8
    frequency = model.model.rotary_emb.inv_freq[:fast]
    model.model.embed_tokens.weight[:, 0] = 10 * config.initializer_range
    layer.k_proj.weight.mul_(0.1)
    layer.q_proj.weight.mul_(0.1)
    keys = layer.k_proj.weight.view(config.num_key_value_heads, 2, -1, config.hidden_size)
    keys[:, 0, :fast, 0] += 0.8
    queries = layer.q_proj.weight.view(config.num_attention_heads, 2, -1, config.hidden_size)
    for head in range(config.num_attention_heads):
        angle = (head + 1) * frequency
        queries[head, 0, :fast, 0] += 0.8 * angle.cos()
        queries[head, 1, :fast, 0] -= 0.8 * angle.sin()


def ramp(x: float, start: float, end: float) -> float:
    """0 up to start, 1 from end on, linear in between."""
    return min(1.0, max(0.0, (x - start) / (end - start)))


def batches(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The token blocks of a run, int64. The first story of a row follows <s>, a later one </s><s> or nothing.

    The last blocks hold a quarter of the rows at four times the length, the whole context of 1024: nearly every story
    fits 256 tokens, and attention takes a share of the time that grows with the length.
    """
    rng = random.Random(f"train {args.seed}")
    for step in range(args.steps):
        long = 4 if step >= (1 - LONG) * args.steps else 1
        rows, length, block = args.rows // long, args.length * long, []
        few = 1 - ramp(step / args.steps, 0.05, 0.3)

        def tell(few: float = few) -> str:
            return world.sample(rng, FEW if rng.random() < few else world.STORY).text

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
    start, seen, losses = time.time(), 0, list[tuple[float, float]]()
    try:
        for step, ids in enumerate(batches(tokenizer, args)):
            loss = F.cross_entropy(
                work(input_ids=ids).logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
            )
            answers = in_answer(ids, *marks)[:, 1:]
            done = step / args.steps
            weight = torch.where(answers, 1.0, LEAST_WEIGHT + (1 - LEAST_WEIGHT) * ramp(done, 0.5, 0.75))
            ((weight * loss).sum() / weight.sum()).backward()
            rate = args.lr * min((step + 1) / args.warmup, 1 - ramp(done, 0.5, 1.0))
            update(model, work, opts, rate)
            seen += ids.numel()
            losses.append((loss.mean().item(), loss[answers].mean().item()))
            if (step + 1) % 20 == 0:
                mean, asked = (sum(column) / 20 for column in zip(*losses[-20:], strict=True))
                print(
                    f"step {step + 1}: {mean:.4f} nats/token, {asked:.4f} in answers, {seen / 1e6:.2f} M tokens, "
                    f"{time.time() - start:.0f} s",
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
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
