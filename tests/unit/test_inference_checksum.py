"""Checksums of tensors: the same bytes give the same number, and nothing that happens to bytes on their way goes unseen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from webdancer.errors import DataError
from webdancer.inference import checksum as module
from webdancer.inference.checksum import check, checksum, numbers

BYTES = st.binary(max_size=200)


def of(data: bytes) -> int:
    return int(checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)))


@given(BYTES, st.integers(1, 255), st.data())
def test_any_byte_that_changes_is_seen(data, change, draw):
    if data:
        at = draw.draw(st.integers(0, len(data) - 1))
        changed = data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]
        assert of(changed) != of(data)
    assert of(data + b"\0") != of(data)


@given(BYTES, BYTES)
def test_equal_bytes_alone_have_equal_numbers(one, other):
    assert (of(one) == of(other)) == (one == other)


@settings(max_examples=20)
@given(st.integers(1, 100), st.integers(0, 15), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_where_and_as_what_the_bytes_lie_makes_no_difference(count, offset, dtype):
    values = torch.randn(count).to(dtype)
    raw = values.view(torch.uint8)
    packed = torch.cat([torch.ones(offset, dtype=torch.uint8), raw])[offset:]
    assert int(checksum(packed)) == int(checksum(values)) == int(checksum(values.reshape(1, count).t())) == of(bytes(raw.tolist()))


def test_blocks_cannot_change_places(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    module._places.cache_clear()
    try:
        one, two = torch.randn(2, 32)
        last = torch.randn(5)
        assert int(checksum(torch.cat([one, two, last]))) != int(checksum(torch.cat([two, one, last])))
        assert int(checksum(torch.cat([one, one, last]))) != int(checksum(torch.cat([one, last])))
    finally:
        module._places.cache_clear()


def test_no_two_words_change_places_unseen():
    """Words whose highest number alone differs, which a sum linear in the words takes for one another now and then."""
    words = torch.randint(0, 2**15, (400, 1), generator=torch.Generator().manual_seed(0))
    tensor = torch.cat([torch.full((400, 3), 7), words], dim=1).to(torch.int16)
    right = int(checksum(tensor))
    for row in range(0, 400, 8):
        for other in range(row + 1, 400, 7):
            tensor[[row, other]] = tensor[[other, row]]
            assert (int(checksum(tensor)) == right) == bool(words[row] == words[other])
            tensor[[row, other]] = tensor[[other, row]]


def test_what_differs_is_named():
    sent = numbers({"a": checksum(torch.ones(3)), "b": checksum(torch.zeros(3))})
    check(sent, dict(sent))
    with pytest.raises(DataError, match=r"weights: a must have the checksum of what was sent, [0-9a-f]{16}, got [0-9a-f]{16}"):
        check(sent, sent | numbers({"a": checksum(torch.tensor([1.0, 1.0, -1.0]))}))
    with pytest.raises(DataError, match="weights: b must arrive"):
        check(sent, {"a": sent["a"]})
    with pytest.raises(DataError, match="weights: b must be among what was sent"):
        check({"a": sent["a"]}, sent)
    assert numbers({}) == {}
