"""Megatron-Core's ``dp_reshardable`` optimizer state: flat buckets, whose parameters the file does not name.

A bucket has one flat tensor per slot: local shards of parameters, end to end, in the reverse order of
``named_parameters()`` (``distributed/param_and_grad_buffer.py``), each beginning where a chunk of the checkpoint
begins, at multiples of 64 elements (``optimizer/distrib_optimizer.py``). One of the slots is ``param``, the fp32 master
weights. Rounded to the model's dtype they are the very weights that stand in the same folder under their names: that
proves which parameter a range belongs to. Where weights are equal (norms that are still ones, biases that are still
zeros), Megatron's order of parameters decides if only one assignment fits it; else nothing is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise
from math import prod
from typing import Any, Final, TypeAlias

import xxhash

from lora_state_format.errors import AmbiguousOrderError, RefusedError
from lora_state_format.foreign.masters import ROUNDED, elements, rounded
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.sources import Unread
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous

__all__ = ["MASTER", "Bucket", "NotAllError", "look_at", "take_apart"]

WAY_OUT: Final = "save with Megatron's --dist-ckpt-optim-fully-reshardable"

MASTER: Final = "param"
"""The slot of the fp32 master weights."""

PADDING: Final = 64
"""Elements to whose multiples the beginning of a parameter is padded."""

PREFIX: Final = 8
"""Elements by which shards are looked up before all of their bytes are hashed."""

MAX_OPTIONAL: Final = 8
"""Blocks that may or may not be in a bucket, for which every choice is tried."""

_DENSE: Final = (
    "self_attention.linear_proj.weight", "self_attention.linear_proj.bias",
    "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias",
    "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm.weight", "self_attention.q_layernorm.bias",
    "self_attention.k_layernorm.weight", "self_attention.k_layernorm.bias",
    "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias",
    "mlp.router.weight", "mlp.router.bias",
    "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias",
    "mlp.linear_fc1.weight", "mlp.linear_fc1.bias", "mlp.linear_fc2.weight", "mlp.linear_fc2.bias",
)  # fmt: skip
_NORM: Final = ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias")
_ROUTED: Final = ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias")
_FIRST: Final = (*_NORM, *(name for name in _DENSE if name not in _NORM))
ORDERS: Final = (
    _DENSE,  # Transformer Engine, whose linear layers hold the norms before them
    _FIRST,  # Megatron's own layers: the norm is a module of its own, and comes first
    tuple(name for name in _FIRST if not name.startswith("mlp.router") and name not in _ROUTED)
    + _ROUTED
    + ("mlp.router.weight", "mlp.router.bias"),
)
"""Orders of a layer's parameters in ``named_parameters()``: ``transformer_layer.py`` with its specifications."""

_LAYER: Final = re.compile(r"(?:module\.)*decoder\.layers\.(\d+)\.(.*)")
_EXPERT: Final = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_TOP: Final = {"embedding.": 0, "decoder.final_layernorm.": 2, "output_layer.": 3}
"""Where modules outside the layers stand; layers are 1."""

_Key: TypeAlias = "tuple[str, int, bytes]"
"""dtype, number of elements and digest of a shard: equal for shards of equal weights."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A flat bucket and its slots.

    ``domain`` names the buffer that it is a part of: each tensor-, pipeline- and expert-parallel place has its own.
    """

    domain: str
    slots: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A tensor-parallel rank's part of a parameter: boxes of the whole, whose elements stand end to end in a bucket."""

    name: str
    index: int
    of: int
    boxes: tuple[Box, ...]
    key: _Key


@dataclass(frozen=True, slots=True)
class _Place:
    """A range of a bucket that equals some shard's weights."""

    bucket: int
    start: int
    key: _Key


@dataclass(frozen=True, slots=True)
class _Index:
    """The shards by their keys, and the sizes of those that begin with given elements, by dtype and those elements."""

    alike: dict[_Key, list[_Shard]] = field(default_factory=dict)
    sizes: dict[tuple[str, bytes], set[int]] = field(default_factory=dict)


def take_apart(
    buckets: Sequence[Bucket], weights: Mapping[str, Tensor], path: object
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return each parameter's slots, and how many ranges Megatron's order had to tell apart.

    Args:
        buckets: all buckets, those of a domain in the order in which Megatron numbers them.
        weights: the model's parameters by name, layers and experts apart; the pieces of each are its shards.
        path: the file, for messages.

    Raises:
        RefusedError: a bucket has no master weights, or a range of one equals no weight.
        AmbiguousOrderError: weights are equal, and the order does not tell them apart.
    """
    index = _Index()
    for name, weight in weights.items():
        for shard in _shards(name, weight):
            index.alike.setdefault(shard.key, []).append(shard)
            first = weight.part(shard.boxes[0].start, shard.boxes[0].shape)
            begins = bytes(elements(first, 0, min(PREFIX, first.count)))
            index.sizes.setdefault((weight.dtype, begins), set()).add(shard.key[1])
    places: dict[str, list[_Place]] = {}
    gap = 0
    for number, bucket in enumerate(buckets):
        for item in _places(number, bucket, index, path):
            if isinstance(item, _Place):
                places.setdefault(bucket.domain, []).append(item)
            else:
                gap = max(gap, item)
    held: dict[_Shard, _Place] = {}
    told = 0
    for domain, inside in places.items():
        found, ordered = _assigned(domain, inside, index, path)
        told += ordered
        for place, shard in found.items():
            held.setdefault(shard, place)
    return _joined(buckets, weights, held, gap, path), told


class NotAllError(Exception):
    """The buckets have no room for all weights: only their bytes say which have state."""


def look_at(buckets: Sequence[Bucket], weights: Mapping[str, Tensor], path: object) -> dict[str, dict[str, Tensor]]:
    """Return the slots of all weights, without bytes: what ``take_apart`` returns if each of them has state.

    Args:
        buckets: all buckets.
        weights: the model's parameters by name, as for ``take_apart``.
        path: the file, for messages.

    Raises:
        NotAllError: some of the weights have no state.
    """
    trained = {name: weight for name, weight in weights.items() if weight.dtype in ROUNDED and weight.count}
    room = sum(next(iter(bucket.slots.values())).count for bucket in buckets)
    if sum(weight.count for weight in trained.values()) > room:
        raise NotAllError
    slots = {slot: tensor.dtype for bucket in buckets for slot, tensor in bucket.slots.items()}
    return {
        name: {slot: contiguous(dtype, weight.shape, Unread(path)) for slot, dtype in slots.items()}
        for name, weight in trained.items()
    }


def _shards(name: str, weight: Tensor) -> Iterator[_Shard]:
    """Yield the shards that tensor-parallel ranks may have had of a parameter.

    A chunk of the checkpoint is a shard. Of a gated linear unit's ``linear_fc1`` it is a half of one: rank ``r`` of
    ``n`` has the chunks ``r`` and ``n + r`` (``transformer/mlp.py``).
    """
    if weight.dtype not in ROUNDED or not weight.count:
        return
    boxes = sorted((piece.where for piece in weight.pieces if isinstance(piece.where, Box)), key=lambda box: box.start)
    for halves in (1, 2) if "linear_fc1." in name else (1,):
        of, rest = divmod(len(boxes), halves)
        for index in range(0 if rest else of):
            own = tuple(boxes[index::of])
            digest = xxhash.xxh3_128()
            for chunk in chain.from_iterable(weight.part(box.start, box.shape).chunks() for box in own):
                digest.update(chunk)
            yield _Shard(name, index, of, own, (weight.dtype, sum(prod(box.shape) for box in own), digest.digest()))


def _places(number: int, bucket: Bucket, index: _Index, path: object) -> Iterator[_Place | int]:
    """Yield the ranges of a bucket that equal shards, and the sizes of the padding between them."""
    master = bucket.slots.get(MASTER)
    if master is None or any(slot.shape != master.shape or len(slot.shape) != 1 for slot in bucket.slots.values()):
        raise RefusedError(
            f"{bucket.domain} has no fp32 master weights ('{MASTER}') of the size of its other slots, and nothing else "
            f"tells its parameters apart: {WAY_OUT}",
            path=path,
        )
    borders = sorted({piece.where.start[0] for piece in master.pieces if isinstance(piece.where, Box)})
    borders.append(master.count)
    position = 0
    for start, following in pairwise(borders):
        if start < position:
            continue
        fitting = _fitting(master, start, set(borders), index)
        if fitting:
            longest = max(fitting, key=lambda key: key[1])
            names = {shard.name for shard in index.alike[longest]}
            if any(shard.name not in names for key in fitting for shard in index.alike[key]):
                sizes = " or ".join(str(key[1]) for key in fitting)
                raise AmbiguousOrderError(
                    f"{path}: in {bucket.domain} a weight of {sizes} elements begins at {start}: {WAY_OUT}"
                )
            yield _Place(number, start, longest)
            position = start + longest[1]
        elif following - start < PADDING:
            yield following - start
        else:
            raise RefusedError(
                f"{bucket.domain} holds {following - start} elements from {start} on that equal no weight of the model "
                f"in this folder: {WAY_OUT}",
                path=path,
            )


def _fitting(master: Tensor, start: int, borders: set[int], index: _Index) -> list[_Key]:
    """Return the keys of the shards that the range from ``start`` on equals, rounded."""
    found = []
    lengths = {(dtype, len(begins) // item_size(dtype)) for dtype, begins in index.sizes}
    for dtype, length in sorted(lengths):
        if start + length > master.count:
            continue
        begins = b"".join(rounded(master.part((start,), (length,)), dtype))
        for count in sorted(index.sizes.get((dtype, begins), ())):
            if start + count in borders:
                digest = xxhash.xxh3_128()
                for chunk in rounded(master.part((start,), (count,)), dtype):
                    digest.update(chunk)
                if (key := (dtype, count, digest.digest())) in index.alike:
                    found.append(key)
    return found


# --- which of several equal shards ------------------------------------------------------------------------------


def _assigned(domain: str, places: Sequence[_Place], index: _Index, path: object) -> tuple[dict[_Place, _Shard], int]:
    """Return the shard of each range of a buffer, and how many of them the order had to tell apart."""
    options = _of_one_place({place: index.alike[place.key] for place in places})
    left = sum(len(shards) != 1 for shards in options.values())
    if not left and len({shards[0].name for shards in options.values()}) == len(places):
        return {place: shards[0] for place, shards in options.items()}, 0
    solutions = {tuple(found) for order in ORDERS for found in _in_order(options, order)}
    if len(solutions) != 1:
        place, shards = next((p, s) for p, s in options.items() if len(s) != 1 or left == 0)
        names = sorted({shard.name for shard in shards})
        raise AmbiguousOrderError(
            f"{path}: in {domain} the {place.key[1]} elements from {place.start} on equal the weights of {len(names)} "
            f"parameters ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), and {len(solutions) or 'no'} "
            f"assignments fit Megatron's order: {WAY_OUT}",
            tuple(names),
        )
    return dict(zip(options, solutions.pop(), strict=True)), left


def _of_one_place(options: Mapping[_Place, Sequence[_Shard]]) -> dict[_Place, list[_Shard]]:
    """Return the shards that may be in each range, without those that what is certain rules out.

    All of a buffer is of one tensor-parallel rank, and of experts or of none.
    """
    sure = [shards[0] for shards in options.values() if len(shards) == 1]
    ranks = {shard.index for shard in sure if shard.of > 1}
    experts = {".experts." in shard.name for shard in sure}

    def fits(shard: _Shard) -> bool:
        of_rank = len(ranks) != 1 or shard.of == 1 or shard.index in ranks
        return of_rank and (len(experts) != 1 or (".experts." in shard.name) in experts)

    return {place: list(filter(fits, shards)) for place, shards in options.items()}


def _in_order(options: Mapping[_Place, Sequence[_Shard]], order: Sequence[str]) -> Iterator[list[_Shard]]:
    """Yield the assignments in which the parameters stand in the reverse of an order.

    A layer's parameters are in a buffer all together or not at all. So are those of each module outside the layers.
    """
    ranked: dict[str, Any] = {}
    for shard in chain.from_iterable(options.values()):
        rank = _rank(shard.name, order)
        if rank is None:
            return
        ranked[shard.name] = rank
    certain = {ranked[shards[0].name][:2] for shards in options.values() if len(shards) == 1}
    optional = sorted({rank[:2] for rank in ranked.values()} - certain)
    if len(optional) > MAX_OPTIONAL:
        return
    for chosen in chain.from_iterable(combinations(optional, count) for count in range(len(optional) + 1)):
        names = [name for name, rank in ranked.items() if rank[:2] in certain or rank[:2] in chosen]
        if len(names) == len(options):
            names.sort(key=ranked.__getitem__, reverse=True)
            found = [
                [shard for shard in shards if shard.name == name]
                for name, shards in zip(names, options.values(), strict=True)
            ]
            if all(len(shards) == 1 for shards in found):
                yield [shards[0] for shards in found]


def _rank(name: str, order: Sequence[str]) -> tuple[int, ...] | None:
    """Return where a parameter stands in the model: module, layer, and places within; ``None`` if it is not known."""
    if match := _LAYER.fullmatch(name):
        layer, rest = int(match[1]), match[2]
        if expert := _EXPERT.fullmatch(rest):
            return 1, layer, len(order), int(expert[1]), int(expert[2][-1]), int(expert[3] == "bias")
        return (1, layer, order.index(rest)) if rest in order else None
    bare = re.sub(r"^(?:module\.)+", "", name)
    top = next((place for prefix, place in _TOP.items() if bare.startswith(prefix)), None)
    return None if top is None else (top, 0, int("position" in bare), int(bare.endswith("bias")))


# --- the result -------------------------------------------------------------------------------------------------


def _joined(
    buckets: Sequence[Bucket],
    weights: Mapping[str, Tensor],
    held: Mapping[_Shard, _Place],
    gap: int,
    path: object,
) -> dict[str, dict[str, Tensor]]:
    """Return the slots of the parameters, put together from their shards. ``gap`` is the size of the widest padding."""
    by_name: dict[str, list[_Shard]] = {}
    for shard in held:
        by_name.setdefault(shard.name, []).append(shard)
    result: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        whole = next(
            (
                own
                for of in sorted({shard.of for shard in by_name.get(name, ())})
                if len(own := [shard for shard in by_name[name] if shard.of == of]) == of
            ),
            None,
        )
        if whole is None:
            if name in by_name or 0 < weight.count <= gap:
                raise RefusedError(
                    f"{len(by_name.get(name, ()))} of the shards of '{name}' are in the buckets, by their weights: "
                    f"{WAY_OUT}",
                    path=path,
                )
            continue  # not trained
        slots = buckets[held[whole[0]].bucket].slots
        result[name] = {
            slot: Tensor(tensor.dtype, weight.shape, tuple(_pieces(whole, held, buckets, slot)))
            for slot, tensor in slots.items()
        }
    return result


def _pieces(
    shards: Sequence[_Shard], held: Mapping[_Shard, _Place], buckets: Sequence[Bucket], slot: str
) -> Iterator[Piece]:
    for shard in shards:
        place = held[shard]
        flat, position = buckets[place.bucket].slots[slot], place.start
        for box in shard.boxes:
            yield Piece(flat, position * item_size(flat.dtype), box)
            position += prod(box.shape)
