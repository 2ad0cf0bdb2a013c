"""File type -> type of every tensor: as llama.cpp chooses, live where it is installed and against stored maps."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bitsmith.errors import UserError
from bitsmith.quant_formats.gguf_mixture import (
    SIZES,
    Overrides,
    check_imatrix,
    file_type,
    ggml_type,
    is_quantized,
    parse_overrides,
    parse_tensor_type,
    tensor_bytes,
    tensor_types,
)
from bitsmith.quant_formats.gguf_rules import MIXTURES, Facts

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from gguf_models import CASES, HEADS, llama_quantize, tensors, write, write_imatrix  # noqa: E402

GOLDEN = json.loads((HERE / "golden" / "gguf_mixture.json").read_text())
THEIRS = [name for name in MIXTURES if name not in ("mxfp4", "nvfp4")]
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install it to compare"
)
# ggml's ids of types the tests override with.
IDS = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "IQ4_XS": 23, "F16": 1, "IQ2_S": 22}


def facts(case: str, has_imatrix: bool = False) -> Facts:
    about = CASES[case]
    return Facts(about["arch"], about["layers"], HEADS, about["kv"], about.get("experts", 0), has_imatrix)


def ours(case: str, name: str, has_imatrix: bool = False, overrides: Overrides | None = None) -> dict[str, str] | None:
    """The plan, or None where it is refused."""
    covered = [n for n, _ in tensors(case)] if has_imatrix else []
    try:
        types = tensor_types(name, facts(case, has_imatrix), tensors(case), overrides).types
        check_imatrix(name, types, covered)
    except UserError:
        return None
    return types


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASE.gguf and CASE.npz (an importance matrix) for every case."""
    folder = tmp_path_factory.mktemp("gguf")
    for case in CASES:
        write(case, folder / f"{case}.gguf")
        write_imatrix(case, folder / f"{case}.npz")
    return folder


def job(files: Path, case: str, name: str, has_imatrix: bool = False, **more: Any) -> dict[str, Any]:
    imatrix = {"imatrix": str(files / f"{case}.npz")} if has_imatrix else {}
    return {"src": str(files / f"{case}.gguf"), "ftype": MIXTURES[name].ftype, **imatrix, **more}


@pytest.mark.parametrize("case", GOLDEN["maps"])
def test_stored_maps(case: str) -> None:
    stored = GOLDEN["maps"][case]
    assert set(stored) == {*THEIRS, *(f"{name} imatrix" for name in THEIRS)}
    for key, row in stored.items():
        name, _, imatrix = key.partition(" ")
        expected = row and {t: GOLDEN["types"][c] for (t, _), c in zip(tensors(case), row, strict=True)}
        assert ours(case, name, bool(imatrix)) == expected, key


@needs_llama
@pytest.mark.slow
def test_every_file_type_on_every_model_is_llama_cpps(files: Path) -> None:
    wanted = [(case, name, imatrix) for case in CASES for name in THEIRS for imatrix in (False, True)]
    found = llama_quantize([job(files, *w) for w in wanted])
    for (case, name, imatrix), types in zip(wanted, found, strict=True):
        assert ours(case, name, imatrix) == types, (case, name, imatrix)


@needs_llama
@pytest.mark.slow
def test_written_files_hold_what_the_dry_run_says(files: Path, tmp_path: Path) -> None:
    wanted = [("mixtral", name, imatrix) for name in THEIRS for imatrix in (False, True)]
    found = llama_quantize([job(files, *w, dst=str(tmp_path / "out.gguf")) for w in wanted])
    for (case, name, imatrix), types in zip(wanted, found, strict=True):
        assert ours(case, name, imatrix) == types, (case, name, imatrix)


OVERRIDES = [
    Overrides(pure=True),
    Overrides(output="Q8_0"),
    Overrides(token_embedding="Q4_0"),
    Overrides(output="Q4_K", token_embedding="Q8_0", pure=True),
    Overrides(tensors=((r"ffn_down", "Q8_0"), (r"blk\.[0-3]\.", "Q6_K"), (r"attn_v", "F16"))),
    Overrides(tensors=((r"output", "IQ4_XS"),), output="Q8_0"),
    Overrides(tensors=((r"attn_(q|k)\.weight$", "IQ4_XS"), (r"token_embd", "Q4_0")), pure=True),
    Overrides(tensors=((r"attn_v", "IQ2_S"),)),
]


@needs_llama
@pytest.mark.slow
def test_overrides_are_llama_cpps(files: Path) -> None:
    names, cases = ("q4_k_m", "iq2_m", "q8_0", "mxfp4_moe"), ("llama-gqa4", "llama-odd", "mixtral", "gemma2")
    wanted = [(c, n, i, o) for c in cases for n in names for i in (False, True) for o in OVERRIDES]
    jobs = []
    for case, name, imatrix, asked in wanted:
        more: dict[str, Any] = {"pure": asked.pure}
        if asked.output:
            more["output"] = IDS[asked.output]
        if asked.token_embedding:
            more["token_embedding"] = IDS[asked.token_embedding]
        if asked.tensors:
            more["tensors"] = [[pattern, IDS[kind]] for pattern, kind in asked.tensors]
        jobs.append(job(files, case, name, imatrix, **more))
    for (case, name, imatrix, asked), types in zip(wanted, llama_quantize(jobs), strict=True):
        found = ours(case, name, imatrix, asked)
        for tensor, kind in (types or {}).items():
            # Named outright, llama.cpp takes these two without a look at the shape, and aborts when it packs them.
            named = {"output.weight": asked.output, "token_embd.weight": asked.token_embedding}.get(tensor)
            if named and case == "llama-odd":
                assert kind == named
            else:
                assert found is not None and found[tensor] == kind, (case, name, imatrix, asked, tensor)
        assert (types is None) == (found is None), (case, name, imatrix, asked)


@needs_llama
def test_ids_and_sizes_are_ggmls(files: Path) -> None:
    import llama_cpp

    theirs = {key[6:]: value for key, value in vars(llama_cpp).items() if key.startswith("LLAMA_FTYPE_")}
    for name in THEIRS:
        constant = theirs.get(f"MOSTLY_{name.upper()}", theirs.get(f"ALL_{name.upper()}"))
        # The binding does not name the newest ones; their ids are in the golden files' making.
        assert constant in (None, MIXTURES[name].ftype) or name.startswith("mxfp4"), name
    (types,) = llama_quantize([job(files, "phi3", "q2_0")])
    assert types is not None and "Q2_0" in types.values() and SIZES["Q2_0"] == (64, 18)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_four_bit_floats_of_a_dense_model(name: str) -> None:
    for case in ("llama-gqa4", "gemma2", "mixtral"):
        types = tensor_types(name, facts(case), tensors(case)).types
        kinds = {t: k for t, k in types.items() if is_quantized(t, dict(tensors(case))[t], "llama")}
        assert {k for t, k in kinds.items() if t not in ("token_embd.weight", "output.weight")} <= {
            name.upper(),
            *(("Q8_0", "Q5_K") if case == "mixtral" else ()),
        }
        assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_q.weight"] == name.upper()


def test_order_of_the_tensors_does_not_matter() -> None:
    for case in ("llama-gqa4", "mixtral"):
        shuffled = sorted(tensors(case), key=lambda t: t[0][::-1])
        assert tensor_types("q4_k_m", facts(case), shuffled).types == ours(case, "q4_k_m")


def test_fallbacks_are_reported() -> None:
    plan = tensor_types("q4_k_m", facts("llama-odd"), tensors("llama-odd"))
    assert plan.types["blk.1.attn_q.weight"] == "Q5_0" and plan.fallbacks["blk.1.attn_q.weight"] == "Q4_K"
    assert plan.types["blk.1.ffn_down.weight"] == "F16" and "blk.1.attn_norm.weight" not in plan.fallbacks


def test_an_imatrix_that_misses_a_tensor_is_named() -> None:
    types = tensor_types("iq2_xs", facts("llama-gqa4", True), tensors("llama-gqa4")).types
    check_imatrix("iq2_xs", types, types)
    with pytest.raises(UserError, match=r"blk\.3\.ffn_up\.weight becomes IQ2_XS .*--imatrix"):
        check_imatrix("iq2_xs", types, set(types) - {"blk.3.ffn_up.weight"})
    q2_k = tensor_types("q2_k", facts("llama-gqa4"), tensors("llama-gqa4")).types
    check_imatrix("q2_k", q2_k)
    with pytest.raises(UserError, match="q2_k_s"):
        check_imatrix("Q2_K_S", q2_k)
    pure = tensor_types("iq2_xs", facts("llama-gqa4", True), tensors("llama-gqa4"), Overrides(pure=True)).types
    with pytest.raises(UserError, match=r"token_embd\.weight becomes IQ2_XS"):
        check_imatrix("iq2_xs", pure, set(types) - {"token_embd.weight"})


def test_bad_input_is_named() -> None:
    assert file_type("Q4_K") == "q4_k_m" and ggml_type("q4_k", "") == "Q4_K"
    assert parse_tensor_type("ffn_.*=q6_k") == ("ffn_.*", "Q6_K")
    for call, said in [
        (lambda: file_type("q7_k"), "'q7_k' is not known; accepted: .*q4_k_m"),
        (lambda: ggml_type("q4_k_m", "--output-tensor-type"), "--output-tensor-type: 'q4_k_m' is no ggml type"),
        (lambda: parse_tensor_type("ffn_down"), "expected REGEX=TYPE"),
        (lambda: parse_tensor_type("(=q8_0"), "not a valid regex"),
        (lambda: parse_tensor_type("x=q99"), "'q99' is no ggml type"),
        (
            lambda: tensor_types("q1_0", facts("llama-odd"), tensors("llama-odd")),
            r"96 weights are no multiple of the 128",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            call()


def test_flags_as_llama_quantize_spells_them() -> None:
    asked = parse_overrides(False, "q8_0", "Q4_K", ["ffn_down=q6_k", r"blk\.0\..*=F16"])
    expected = Overrides(False, "Q8_0", "Q4_K", (("ffn_down", "Q6_K"), (r"blk\.0\..*", "F16")))
    assert asked == expected and parse_overrides() == Overrides()
    types = tensor_types("q4_k_m", facts("llama-gqa4"), tensors("llama-gqa4"), asked).types
    names = (
        "output.weight",
        "token_embd.weight",
        "blk.3.ffn_down.weight",
        "blk.0.attn_q.weight",
        "blk.1.attn_q.weight",
    )
    assert [types[name] for name in names] == ["Q8_0", "Q4_K", "Q6_K", "F16", "Q4_K"]
    for arguments, said in [
        ({"output_tensor_type": "q4_k_m"}, "--output-tensor-type: 'q4_k_m' is no ggml type"),
        ({"token_embedding_type": "q9"}, "--token-embedding-type: 'q9' is no ggml type"),
        ({"tensor_type": ["ffn_down"]}, "--tensor-type 'ffn_down': expected REGEX=TYPE"),
    ]:
        with pytest.raises(UserError, match=said):
            parse_overrides(**arguments)  # type: ignore[arg-type]


def test_bytes_are_those_of_whole_blocks() -> None:
    assert tensor_bytes("Q4_K", (10, 512)) == 10 * 2 * 144
    assert tensor_bytes("IQ4_NL", (3, 4, 64)) == 12 * 2 * 18
    assert tensor_bytes("F16", (3, 5)) == 30
