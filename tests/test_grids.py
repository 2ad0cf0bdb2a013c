"""Named grids: a code's bits are what kernels/grids.py says, element by element against the vectors of gguf-py."""

import pytest
import torch
from bitsmith.kernels import grids
from bitsmith.kernels.spec import GRIDS
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
        if table.signs == 0:
            wanted = [v - 0.125 if rest else v + 0.125 for v in numbers]
        else:
            minus = [rest >> i & 1 for i in range(table.signs)]
            minus += [sum(minus) % 2] * (8 - table.signs)
            wanted = [-v if m else v for v, m in zip(numbers, minus, strict=True)]
        assert found[row, column].tolist() == wanted


def test_scale_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert grids.scale_numbers("iq2xs", codes)[:3].tolist() == [0.125, 0.375, 0.625]
    assert grids.scale_numbers("iq3s", codes)[-1].item() == 31 and grids.scale_numbers("iq1m", codes)[7].item() == 15
