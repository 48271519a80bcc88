# fmt: off
# ruff: noqa: B905, E401, E701, I001, N818, SIM905, T201
"""A reader of named optimizer state, made from format.md alone, with the standard library alone; dense on purpose.

``python spec/reader.py PATH`` prints what is in a file or a set. Without XXH3 (R21), tensors are NOT VERIFIED here."""
import functools, hashlib, json, math, re, sys
from collections import namedtuple
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

PREFIX = b'{"__metadata__":{"optimizer_state":"{\\"digest\\":\\"'
BITS = {name: int((re.findall("[0-9]+", name) or [8])[0]) for name in """F4 F6_E2M3 F6_E3M2 BOOL U8 I8 F8_E5M2 F8_E4M3
  F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64""".split()}
TABLE_2 = """manifest: format s, version s, optimizers a, groups a, parameters a, states a, naming o, digests o,
  globals? o, origin? o, extra? o, extensions? o, global_step? n, weights? o, set? o; optimizers: class s0, id? s;
  groups: optimizer n, count n, options a, name? s; parameters: name s, shape a, state n0, dtype? s, adapter? s,
  tied? a, keys? o, id? nso; naming: source s, rule? s, details? o; weights: algorithm s, values a;
  digests: algorithm s, values a; set: id s, index n, count n, positions a"""  # string, array, object, natural, null
OBJECTS = {k.strip(): dict(map(str.split, v.split(","))) for k, v in (row.split(":") for row in TABLE_2.split(";"))}
TYPES, COMMON = {"s": str, "a": list, "o": dict, "n": int, "0": type(None)}, "optimizers naming extensions global_step"
DTYPE, SHAPE, TEXT = f'"({"|".join(BITS)})"', r"\[([0-9]+(, [0-9]+){,63})?\]", r'"[^"\\]*(?:\\.[^"\\]*)*"'
ENTRY = rf'{{"data_offsets": \[[0-9]+, [0-9]+\], "dtype": {DTYPE}, "shape": {SHAPE}}}'
INDEX = rf"""{{"metadata": {{"format": "named-optimizer-state", "set": {TEXT}, "total_size": [0-9]+}}, "shards": \[({{
"digest": {TEXT}, "file": {TEXT}}}(, (?={{))?){{1,256}}\], "weight_map": {{.*}}}}""".replace("\n", "")
Scalar = namedtuple("Scalar", "dtype data")  # a tensor without axes: its bytes
Slot = namedtuple("Slot", "key role")  # a tensor with axes: its key among the state's tensors
Tensor = namedtuple("Tensor", "path dtype shape offset size")  # where its bytes are
hash16 = functools.partial(hashlib.blake2b, digest_size=16)

class Refused(Exception):
    """A file that breaks a rule: the rule's id, what is wrong, and malformed, digest or unsupported."""

def check(condition: Any, rule: str, what: object, kind: str = "malformed") -> None:
    if not condition: raise Refused(rule, what, kind)
def are(kind: Any, values: Any) -> bool:
    return all(type(value) is kind and (kind is not int or 0 <= value < 2**53) for value in values)
def like(form: str, value: Any) -> bool:
    return re.fullmatch(form, json.dumps(value, sort_keys=True, ensure_ascii=False), re.DOTALL) is not None
def parse(data: bytes, utf8_rule: str) -> Any:
    try:
        structure = re.sub(TEXT, "", data.decode(), flags=re.DOTALL)
        depth = max(accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", structure)), default=0)
        check(depth <= 64 and sum(map(structure.count, ",[{")) <= 1 << 21, "R3", "nested too deep, or too many values")
        check(not re.search(r"-0(?![0-9.eE])|NaN|Infinity", structure), "R3", "a number that is none")
        value = json.loads(data)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # fails for 1e999 and a lone surrogate
        check(structure.count(":") == re.sub(TEXT, "", text.decode()).count(":"), "R3", "a member twice")
    except ValueError as error:
        raise Refused(utf8_rule if isinstance(error, UnicodeDecodeError) else "R3", error, "malformed") from None
    return value

def value_of(value: Any, tensor: Any = None) -> Any:
    """A typed value (section 5); ``tensor(label, role)`` makes tensors, without it they are refused."""
    if isinstance(value, list): return [value_of(item, tensor) for item in value]
    check(type(value) is not int or abs(value) < 2**53, "R22", value)
    if not isinstance(value, dict): return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None: return {key: value_of(item, tensor) for key, item in value.items()}
    check(value.keys() == ({"$tensor", "role"} if tag == "$tensor" else {tag}), "R22", f"members beside {tag}")
    match tag, value[tag]:
        case "$tuple", list(body): return tuple(value_of(item, tensor) for item in body)
        case "$float", "inf" | "-inf" | "nan" as body: return float(body)
        case "$int", str(n) if re.fullmatch("-?[1-9][0-9]{15,999}", n) and abs(int(n)) >= 2**53: return int(n)
        case "$bytes", str(body) if re.fullmatch("([0-9a-f]{2})*", body): return bytes.fromhex(body)
        case "$scalar", [str(dtype), data] if like('"([0-9a-f]{2})+"', data) and len(data) * 4 == BITS.get(dtype):
            return Scalar(dtype, bytes.fromhex(data))
        case "$dict", list(body) if all(isinstance(pair, list) and len(pair) == 2 for pair in body):
            items = [(value_of(key), value_of(item, tensor)) for key, item in body]
            check(all(is_key(key) for key, _ in items) and len(dict(items)) == len(items), "R22", "keys of a $dict")
            return dict(items)
        case "$tensor", str(body) if tensor and value["role"] in ("param", "row", "col", "block", "opaque"):
            return tensor(body, value["role"])
    raise Refused("R22", f"{tag} of another form", "malformed")

def is_key(key: Any) -> bool:
    return all(map(is_key, key)) if type(key) is tuple else key is None or type(key) in (bool, int, float, str)
def mapping(value: Any, rule: str = "R12", tensor: Any = None) -> Any:
    check(isinstance(value := value_of(value, tensor), dict) and are(str, value), rule, "no mapping of strings")
    return value
def check_names(parameters: Any, rule: str) -> None:
    names = [name for p in parameters for name in (p["name"], *p.get("tied", []))]
    check(len(set(names)) == len(names) and all(name and name[0] != "$" for name in names), rule, "names")

def read_file(path: Path) -> Any:
    """The state in one file, or the part of it in one shard; ``raw`` is the header with its digest as zeros."""
    end = 8 + int.from_bytes((data := path.read_bytes())[:8], "little")
    check(len(data) >= 8 and end <= min(len(data), 8 + (32 << 20)), "R1", "the header's length")
    raw, digest = data[:58] + b"0" * 32 + data[90:end], data[58:90].decode("latin-1")
    ours = data[8:58] == PREFIX and like('"[0-9a-f]{32}"', digest)
    check(not ours or digest == hash16(raw).hexdigest(), "R9", "the header was changed", "digest")
    check(data[8:9] == b"{" and data[:end].rstrip(b" ")[-1:] == b"}", "R2", "not one object")
    header, tensors = parse(data[8:end], "R2"), {}
    check(isinstance(metadata := header.pop("__metadata__", {}), dict) and are(str, metadata.values()), "R4", "strings")
    for key, entry in header.items():
        check(like(ENTRY, entry), "R4", key)
        (begin, stop), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        check(0 not in shape or math.prod(filter(None, shape)) < 2**53, "R4", key)
        check(math.prod(shape) * BITS[dtype] == (stop - begin) * 8, "R5", key)
        tensors[key] = Tensor(path, dtype, shape, end + begin, stop - begin)
    order = sorted(tensors.values(), key=lambda t: (t.offset, t.size))
    check([t.offset for t in order] + [len(data)] == [*accumulate((t.size for t in order), initial=end)], "R6", "a gap")
    check(ours and metadata.keys() == {"optimizer_state"}, "R7", "not named optimizer state")
    check(end % 64 == 0, "R8", "where the data begin")
    envelope = parse(metadata["optimizer_state"].encode(), "R3")
    check(envelope.keys() == {"digest", "manifest"} and isinstance(envelope["manifest"], dict), "R7", "the envelope")
    return read_manifest(envelope["manifest"], tensors) | {"digest": digest, "raw": raw}

def read_manifest(m: Any, tensors: dict[str, Any]) -> Any:
    check(m.get("format") == "named-optimizer-state", "R10", "format")
    check(like(r'"(0|[1-9][0-9]{,5})\.(0|[1-9][0-9]{,5})"', m.get("version")), "R11", "version")
    check(m["version"].startswith("1."), "R11", "another major version", "unsupported")
    for kind, members in OBJECTS.items():
        known = {name.rstrip("?"): [TYPES[letter] for letter in letters] for name, letters in members.items()}
        found = m if kind == "manifest" else m.get(kind, [])
        for item in found if isinstance(found, list) else [found]:
            check(isinstance(item, dict) and all(name[-1] == "?" or name in item for name in members), "R12", kind)
            check(item.keys() <= known.keys() or m["version"] != "1.0", "R12", kind)
            check(all(any(are(t, [item[key]]) for t in known[key]) for key in item.keys() & known), "R12", kind)
    state = m | {key: mapping(m.get(key, {})) for key in ("origin", "extra", "extensions")} | {"tensors": tensors}
    state["naming"] = m["naming"] | {"details": mapping(m["naming"].get("details", {}))}
    for name, extension in state["extensions"].items():
        check(isinstance(extension, dict) and type(extension.get("must_understand")) is bool, "R13", name)
        check(not extension["must_understand"], "R13", name, "unsupported")
    trees, used = {None: None} | dict(enumerate(m["states"])), set()
    for p in m["parameters"]:
        check(like(SHAPE, p["shape"]) and are(int, p["shape"]) and p.get("dtype", "U8") in BITS, "R12", p["name"])
        check(are(str, [*p.get("tied", []), *p.get("keys", {}).values()]), "R12", p["name"])
        check(type(value_of(p.get("id", 0))) in (int, str), "R12", p["name"])
        check(p["state"] in trees, "R16", p["name"])
    check_names(m["parameters"], "R14")
    check(all(like(rf"\[{TEXT}, .*\]", o) and len(o) == 2 for g in m["groups"] for o in g["options"]), "R12", "options")
    state["groups"] = [g | {"options": [(name, value_of(value)) for name, value in g["options"]]} for g in m["groups"]]
    check(all(len(dict(g["options"])) == len(g["options"]) for g in m["groups"]), "R15", "an option twice")
    owners = [g["optimizer"] for g in m["groups"]] + [len(m["optimizers"]) - 1]
    check(owners == sorted(owners) and sum(g["count"] for g in m["groups"]) <= len(m["parameters"]), "R15", "groups")
    state["common"] = json.dumps([[g | {"count": 0} for g in m["groups"]], *map(m.get, COMMON.split())], sort_keys=True)

    def slots(tree: Any, owner: str = "", shape: Any = ()) -> Any:
        def slot(label: str, role: str) -> Any:
            check(label and "/" not in label and label not in labels, "R17", label)
            labels.append(label)
            if owner:  # else the tree is only looked at
                check((key := f"{owner}/{label}") in tensors, "R17", key)
                used.add(key)
                own, (*a, b, c) = tensors[key].shape, shape if len(shape) > 1 else [-1, -1]
                fits = {"param": [shape], "row": [[*a, b], [*a, b, 1]], "col": [[*a, c], [*a, 1, c]]}
                check(own and (own in fits.get(role, [own]) or owner == "$globals"), "R18", key)
            return Slot(f"{owner}/{label}", role)
        labels: list[str] = []
        return mapping(tree, "R16", slot) if tree is not None else None
    weights = m.get("weights", {"algorithm": "", "values": [None] * len(m["parameters"])})
    for rule, item, n in ("R19", weights, len(m["parameters"])), ("R20", m["digests"], len(tensors)):
        form = '"[0-9a-f]{32}"' if item["algorithm"] == "xxh3-128" else '"([0-9a-f]{2})+"'
        form = form if rule == "R20" else rf"null|\[{DTYPE}, {form}\]"
        check(len(item["values"]) == n and all(like(form, value) for value in item["values"]), rule, "digests")
    for tree in m["states"]: slots(tree)
    state["parameters"] = [p | {"tree": slots(trees[p["state"]], p["name"], p["shape"]), "weights": w and [kind, *w]}
      for kind in [weights["algorithm"]] for p, w in zip(m["parameters"], weights["values"])]
    state["globals"] = slots(m.get("globals", {}), "$globals")
    check(used == tensors.keys(), "R17", "tensors that no slot names")
    place = m.get("set", {"id": "0" * 32, "index": 1, "count": 1, "positions": [*range(len(m["parameters"]))]})
    check(like('"[0-9a-f]{32}"', place["id"]) and 1 <= place["index"] <= place["count"], "R23", "set")
    check(are(int, at := place["positions"]) and len({*at}) == len(at) == len(m["parameters"]), "R23", "positions")
    return state

def read(path: Path) -> Any:
    """The state that a path means: its index's if there is one, else the file's."""
    index = path if path.name.endswith(".index.json") else path.with_name(path.name + ".index.json")
    if not index.exists():
        check("set" not in (state := read_file(path)), "R23", "a shard: open its set")
        return state
    check(index.stat().st_size <= 64 << 20 and like(INDEX, members := parse(index.read_bytes(), "R25")), "R25", "form")
    set_id, shards, parts = members["metadata"]["set"], members["shards"], []
    for number, shard in enumerate(shards, 1):
        plain = re.fullmatch(r"(?!\.\.?\Z)[^/\\\0]+", name := shard["file"])
        check(plain and (file := index.with_name(name)).exists(), "R25", name)
        parts.append(part := read_file(file))
        check({"id": set_id, "index": number, "count": len(shards)}.items() <= part.get("set", {}).items(), "R23", name)
        check(part["digest"] == shard["digest"], "R25", name)
        check(number == 1 or not (part["globals"] or part["origin"] or part["extra"]), "R23", name)
    check(len({part["common"] for part in parts}) == 1, "R23", "shards that do not agree")
    contents = "".join(hash16(p["raw"].replace(set_id.encode(), b"0" * 32)).hexdigest() for p in parts)
    check(hash16(contents.encode()).hexdigest() == set_id, "R24", "the set's id")
    tensors = {key: tensor for part in parts for key, tensor in part["tensors"].items()}
    check({key: t.path.name for key, t in tensors.items()} == members["weight_map"], "R25", "weight_map")
    check(sum(t.size for t in tensors.values()) == members["metadata"]["total_size"], "R25", "total_size")
    groups = [g | {"count": sum(p["groups"][i]["count"] for p in parts)} for i, g in enumerate(parts[0]["groups"])]
    total, union = sum(len(part["parameters"]) for part in parts), {}
    runs = [*pairwise([*accumulate((g["count"] for g in groups), initial=0), total])]
    for part in parts:
        bounds = (run for run, n in zip(runs, [*(g["count"] for g in part["groups"]), total]) for _ in range(n))
        for p, position, (start, stop) in zip(part["parameters"], part["set"]["positions"], bounds):
            check(start <= position < stop and position not in union, "R26", p["name"])
            union[position] = p
    check_names(union.values(), "R26")
    return parts[0] | {"tensors": tensors, "groups": groups, "parameters": [union[n] for n in range(total)]}

if __name__ == "__main__":
    for p in read(Path(sys.argv[1]))["parameters"]: print(p["name"], p["shape"], p["tree"], "(not verified)")
