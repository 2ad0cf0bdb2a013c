"""Memory on large pages, cut into tensors."""

import itertools
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bitsmith.kernels import pages
from bitsmith.kernels.pages import large_pages, on_large_pages

SIZES = (1, 63, 64, 65, 4096, (2 << 20) + 1, 100_000, 70 << 20, 3)


def test_tensors_do_not_meet() -> None:
    with ThreadPoolExecutor(4) as threads:
        tensors = list(threads.map(lambda size: large_pages([size]), SIZES * 3))
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for i, t in enumerate(tensors):
        t.fill_(i)
    assert all(bool((t == i).all()) for i, t in enumerate(tensors))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.int32, torch.float32])
def test_shape_and_dtype(dtype: torch.dtype) -> None:
    found = large_pages((3, 5, 7), dtype)
    assert found.shape == (3, 5, 7) and found.dtype == dtype and found.is_contiguous()
    assert large_pages((0, 5), dtype).shape == (0, 5)
    given = torch.arange(24).view(4, 6).to(dtype).t()
    copy = on_large_pages(given)
    assert torch.equal(copy, given) and copy.is_contiguous()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_memory_is_shared_and_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    class Piece(mmap.mmap):
        def __init__(self, *_: int, **__: int) -> None:
            pieces.add(self)

    monkeypatch.setattr(mmap, "mmap", Piece)
    monkeypatch.setattr(pages, "_rests", [])
    size = pages._PIECE // 2 + 1
    first, small, second = large_pages([size]), large_pages([1000]), large_pages([size])
    assert first.data_ptr() % pages._PAGE == 0 and small.data_ptr() - first.data_ptr() - size < pages._LINE
    # The second has memory of its own, and what the first left is still to be had.
    again = large_pages([1000])
    assert again.data_ptr() - small.data_ptr() == -(-1000 // pages._LINE) * pages._LINE
    assert len(pieces) == 2
    del second
    assert len(pieces) == 1 and int(first.fill_(1).sum()) == size
