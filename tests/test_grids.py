"""Named grids: a code's bits are what kernels/grids.py says, element by element against the vectors of gguf-py."""

import pytest
import torch
from bitsmith.kernels import grids
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import GRIDS, Spec
from gguf import quants


@pytest.mark.parametrize("name", GRIDS)
def test_codes_element_by_element(name: str) -> None:
    table = GRIDS[name]
    codes = torch.randint(0, 1 << table.bits, (4, 16), dtype=torch.int32)
    found = grids.value(name, codes)
    source = getattr(quants, grids.SOURCES[name])
    source.init_grid()
    vectors = source.grid.reshape(source.grid_shape)
    for row, column in ((r, c) for r in range(4) for c in range(16)):
        code = int(codes[row, column])
        fields = [code >> (i * table.index_bits) & ((1 << table.index_bits) - 1) for i in range(table.indices)]
        numbers = [float(v) for index in fields for v in vectors[index]]
        rest = code >> (table.index_bits * table.indices)
        if table.group_shift:
            wanted = numbers
        elif table.signs == 0:
            wanted = [v - 0.125 if rest else v + 0.125 for v in numbers]
        else:
            minus = [rest >> i & 1 for i in range(table.signs)]
            minus += [sum(minus) % 2] * (8 - table.signs)
            wanted = [-v if m else v for v, m in zip(numbers, minus, strict=True)]
        assert found[row, column].tolist() == wanted


def test_scale_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    numbers = {
        name: grids.scale_numbers(Spec("codebook", code.bits, 32, scale="u4:f16:8", table=name, vec=8), codes).tolist()
        for name, code in GRIDS.items()
    }
    assert numbers["iq2xs"][:3] == [0.125, 0.375, 0.625]
    assert numbers["iq3s"][-1] == 31 and numbers["iq1m"][7] == 15
    assert numbers["iq1s"] == 2 * numbers["iq1m"][:8], "the highest bit is the shift"


def test_shift_of_a_group_is_the_highest_bit_of_its_scale_code() -> None:
    """Eight codes of zero, two groups of scale code 1, which is 3; the second is shifted down."""
    parts = {"codes": torch.zeros(1, 3, dtype=torch.int32), "scales": torch.tensor([[0x91]], dtype=torch.int32)}
    parts["super_scales"] = torch.ones(1, dtype=torch.float16)
    q = QTensor(Spec.parse("codebook11.iq1s.v8.g32.u4:f16:2"), (1, 64), parts)
    vector = grids.vectors("iq1s")[0].repeat(4)
    assert q.dequantize()[0].tolist() == [*((vector + 0.125) * 3).tolist(), *((vector - 0.125) * 3).tolist()]
