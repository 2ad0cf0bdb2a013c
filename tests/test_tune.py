"""Tables of measured launches: what is looked up, what a search finds, what a damaged file says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.cli import _bench_kernels
from bitsmith.errors import UserError
from bitsmith.eval import kernel_speed as speed
from bitsmith.eval.kernel_speed import random_weight
from bitsmith.kernels import bits, cuda, plans, tune
from bitsmith.kernels.plans import Plan
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec

ROW: dict[str, Any] = {
    "spec": "affine4.g32.asym", "n": 64, "k": 128, "m": 4, "kernel": "gemv",
    "tile": {"BM": 4, "BN": 32, "BK": 64}, "num_warps": 2, "num_stages": 1, "split": 2, "us": 3.0,
}  # fmt: skip
GPU = "NVIDIA Test-9 (80GB)"
CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the package's, the user's own) folder of tables, empty."""
    monkeypatch.setattr(plans, "PACKAGED", tmp_path / "results" / "tune")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plans.tables.cache_clear()
    return tmp_path / "results" / "tune", tmp_path / "cache" / "bitsmith" / "tune"


def put(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "nvidia-test-9-80gb.json"
    tune.write(path, GPU, rows)
    plans.tables.cache_clear()
    return path


def test_file_names() -> None:
    assert plans.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert plans.file_name("AMD Instinct MI300X") == "amd-instinct-mi300x.json"


def test_look_up(folders: tuple[Path, Path]) -> None:
    key = ("affine4.g32.asym", 64, 128)
    assert plans.tuned(GPU, key, 1) is None
    many = {**ROW, "m": 256, "kernel": "dequant", "tile": {"BN": 32, "BK": 64}, "split": 1}
    put(folders[0], ROW, many)
    for rows, kernel in ((1, "gemv"), (4, "gemv"), (5, "dequant"), (256, "dequant"), (99999, "dequant")):
        found = plans.tuned(GPU, key, rows)
        assert found is not None and found.kernel == kernel, rows
    assert plans.tuned(GPU, key, 3) == Plan("gemv", {"BM": 4, "BN": 32, "BK": 64}, 2, 1, 2)
    for other in ("affine4.g64.asym", "affine4.g32.min.u6:f16:8", "affine3.g32.asym"):
        assert plans.tuned(GPU, (other, 64, 128), 1) is None, "same bits, another decode"
    assert plans.tuned(GPU, ("affine4.g32.asym", 128, 64), 1) is None
    assert plans.tuned("Other", key, 1) is None
    put(folders[1], {**ROW, "split": 7})
    found = plans.tuned(GPU, key, 4)
    assert found is not None and found.split == 7, "the user's own row wins"
    many_found = plans.tuned(GPU, key, 64)
    assert many_found is not None and many_found.kernel == "dequant", "and hides no other"


def test_a_gemv_is_not_used_beyond_its_rows(folders: tuple[Path, Path]) -> None:
    put(folders[0], ROW)
    assert plans.tuned(GPU, ("affine4.g32.asym", 64, 128), 5) is None


def test_a_device_takes_its_table(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    put(folders[0], ROW)
    monkeypatch.setattr(cuda, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(cuda, "_device", lambda device: (90, 132))
    cuda.chosen.cache_clear()
    gpu = torch.device("cuda", 0)
    assert cuda.chosen("affine4.g32.asym", (64, 128), 3, gpu).num_warps == 2
    assert cuda.chosen("affine4.g64.asym", (64, 128), 3, gpu) == cuda.plan(3, (64, 128), 90, 132)
    assert cuda.chosen("affine4.g32.asym", (64, 128), 3, torch.device("cpu")) == cuda.plan(3, (64, 128), 90, 132)
    cuda.chosen.cache_clear()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not a table of tuned kernels"),
        ('{"gpu": "x"}', "not a table of tuned kernels"),
        (json.dumps({"rows": [{**ROW, "kernel": "magic"}]}), "row 1: kernel is 'magic'; accepted: gemv, gemm, dequant"),
        (json.dumps({"rows": [{**ROW, "spec": None}]}), "row 1: spec is None, not a spec such as affine4.g128.asym"),
        (json.dumps({"rows": [{**ROW, "spec": "affine9"}]}), "row 1: spec 'affine9.channel': bits is 9"),
        (
            json.dumps({"rows": [{**ROW, "spec": "affine4.g32.asym.a8"}]}),
            "row 1: spec is 'affine4.g32.asym.a8'; kernels are compiled for 'affine4.g32.asym'",
        ),
        (json.dumps({"rows": [ROW, {**ROW, "split": 0}]}), "row 2: split is 0, not a positive number"),
        (json.dumps({"rows": [{**ROW, "num_warps": "4"}]}), "row 1: num_warps is '4', not a positive number"),
        (
            json.dumps({"rows": [{**ROW, "tile": {"BM": 4, "BN": 32}}]}),
            "accepted: a power of two for each of BK, BM, BN",
        ),
        (json.dumps({"rows": [{**ROW, "tile": {"BM": 4, "BN": 33, "BK": 64}}]}), "'BN': 33"),
    ],
)
def test_a_damaged_table_names_file_and_row(text: str, words: str, folders: tuple[Path, Path]) -> None:
    folders[0].mkdir(parents=True)
    path = folders[0] / "nvidia-test-9-80gb.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        plans.tuned(GPU, ("affine4.g32.asym", 64, 128), 1)
    for word in (str(path), words, "delete the file, or measure again with `bitsmith bench kernels --tune`"):
        assert word in str(caught.value)


def test_writing_replaces_rows_of_the_same_weight(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    tune.write(path, GPU, [ROW, {**ROW, "m": 8}])
    tune.write(path, GPU, [{**ROW, "us": 1.5}])
    table = plans.read(path)
    assert table["gpu"] == GPU and [(r["m"], r["us"]) for r in table["rows"]] == [(4, 1.5), (8, 3.0)]
    assert len(path.read_text().splitlines()) == 4


def test_tables_are_written_where_they_are_found(folders: tuple[Path, Path]) -> None:
    assert tune.default_path(GPU).parent == plans.own_dir() == folders[1]
    (folders[0].parents[1] / ".git").mkdir()
    assert tune.default_path(GPU).parent == plans.PACKAGED


def test_the_search_walks_to_the_best_plan() -> None:
    best = Plan("gemv", {"BM": 1, "BN": 128, "BK": 64}, 8, 4, 8)
    order = {name: {value: i for i, value in enumerate(choices)} for name, choices in tune._CHOICES.items()}

    def cost(plan: Plan) -> float:
        def place(p: Plan, name: str) -> int:
            return order[name][p.tile.get(name, getattr(p, name, 0))]

        return 1 + sum(abs(place(plan, n) - place(best, n)) for n in ("BN", "BK", "num_warps", "num_stages", "split"))

    found = tune.search(Plan("gemv", {"BM": 1, "BN": 32, "BK": 128}, 4, 2, 1), 1, cost)
    assert found.plan == best and found.us == 1
    assert found.tried < 120, "a grid has 4000"


def test_every_neighbour_can_be_launched() -> None:
    for rows in (1, 8, 16, 2048):
        for start in tune.starts(rows, (4096, 4096), 90, 132):
            for plan in tune.neighbours(start, rows):
                changed = [n for n in plan.tile if plan.tile[n] != start.tile[n]]
                changed += [n for n in ("num_warps", "num_stages", "split") if getattr(plan, n) != getattr(start, n)]
                assert len(changed) == 1 and plan.kernel == start.kernel
                assert plan.kernel != "gemv" or plan.tile["BM"] >= rows
                assert plan.kernel != "gemm" or plan.tile["BM"] >= 16


def test_old_gpus_are_offered_no_dot() -> None:
    assert {p.kernel for p in tune.starts(1, (64, 64), 75, 30)} == {"gemv", "dequant"}
    assert {p.kernel for p in tune.starts(32, (64, 64), 75, 30)} == {"dequant"}
    assert {p.kernel for p in tune.starts(4, (64, 64), 80, 30)} == {"gemv", "gemm", "dequant"}


def test_tuning_writes_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    codes = bits.pack(torch.zeros(64, 128, dtype=torch.uint8), 4)
    q = QTensor(Spec.parse("affine4.g32.sym"), (64, 128), {"codes": codes, "scales": torch.ones(64, 4).half()})
    product = cuda.CudaMatmul(q, torch.float16)
    launched: list[Plan] = []
    monkeypatch.setattr(cuda, "launch", lambda x, parts, spec, n, how: launched.append(how))
    monkeypatch.setattr(cuda, "decode", lambda *_: torch.zeros(64, 128).half())

    def timer(run: Any) -> float:
        launched.clear()
        run()
        if not launched:
            return 50.0
        if launched[0].num_warps == 8:
            raise tune.TritonError("out of resource: shared memory")
        return 10.0 if launched[0].kernel == "gemv" else 20.0 if launched[0].tile["BM"] == 16 else 60.0

    told: list[Any] = []
    rows = tune.tune([product], (1, 16, 2048), timer, told.append)
    assert rows == told
    assert [(r["m"], r["kernel"], r["us"]) for r in rows] == [
        (1, "gemv", 10.0),
        (16, "gemm", 20.0),
        (2048, "dequant", 50.0),
    ]
    assert all(r["num_warps"] != 8 for r in rows)
    assert (rows[0]["spec"], rows[0]["n"], rows[0]["k"]) == ("affine4.g32.sym", 64, 128)


def test_tuning_measures_every_spec_asked_for(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that shares family and bits with another has a row of its own; steps and activation have no part in it."""
    pytest.importorskip("triton")
    specs = ["affine4.g64.asym", "Q4_K", "affine8.channel.sym.a8", "affine8.channel.sym", "affine4.g64.asym.perm"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "device_timer", lambda run: 1.0)
    monkeypatch.setattr(speed, "random_weight", lambda spec, shape, device: random_weight(spec, shape, CPU))
    _bench_kernels._tune(torch.device("cuda"), [(256, 256)], [1], _bench_kernels._specs(",".join(specs)))
    found = plans.read(folders[1] / "nvidia-test-9-80gb.json")["rows"]
    assert [row["spec"] for row in found] == [
        "affine4.g32.min.u6:f16:8", "affine4.g64.asym", "affine8.channel.sym"
    ]  # fmt: skip
    plans.tables.cache_clear()
    for row in found:
        assert plans.tuned(GPU, (row["spec"], 256, 256), 1) is not None
