import assert from "node:assert/strict";
import { File } from "node:buffer";
import { createHash } from "node:crypto";
import { createServer } from "node:http";
import { copyFile, mkdtemp, open as openHandle, readFile, readdir, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { Refused, Scalar, Tuple, fromBlob, fromURL, open, openURL, quoted, readContainer, verify } from "../src/index.js";
import { Xxh3, blake2b } from "../src/hashes.js";
import { Float, HUGE, canonical, parse } from "../src/json.js";
import { fromPath, openPath } from "../src/node.js";
import { openMeant } from "../src/open.js";

const VALID = fileURLToPath(new URL("../../../spec/vectors/valid/", import.meta.url));
const INVALID = fileURLToPath(new URL("../../../spec/vectors/invalid/", import.meta.url));
const folder = await mkdtemp(join(tmpdir(), "named-optimizer-state-"));
after(() => rm(folder, { recursive: true }));

// Made by Python's hashlib and xxhash of `bytes(n)`.
const HASHES = {
  blake2b: {
    127: "e00ab0ead4d729de8fbe7745d642e416",
    128: "8e0cf9bb1b36fa6c42aa6490f719b575",
    129: "6cefde50e4008690e61cf8225d101256",
    5000: "62b6835b24c31d9038dd5a4cb363f876",
  },
  xxh3: {
    0: "99aa06d3014798d86001c324468d497f",
    1: "22bbb76b211a39ba13e608bc156defed",
    3: "ce31763cbf8245a5a9088dda485b481c",
    4: "47197970590746b1788a609154b0fe20",
    8: "e3bc8a5f461715553cd024e3d63a1588",
    9: "c72c88247a9a56d7eafab1c7f123109f",
    16: "ce0b9647ab24f88460d75c5e47d40a24",
    17: "bfd327edcc2fbd12eeed7654312a26d7",
    32: "4f130f27ab6baf45d761fd22e8ad5262",
    33: "d15b272993d9830f4193c535612ac940",
    64: "fed953fe6a8b2b63aa549d72c69cd267",
    65: "9f5580903f79bec343622ea01271a860",
    96: "2a350495986db37a0ab63bcfbc907abb",
    97: "3ffe2e0f781d623c8d17d1afec22619e",
    128: "1b1962a096bac78bc580008b6c92ac53",
    129: "293e4968c4619023bd91ce7ace4d385b",
    160: "d71519a37cb75ab60e298e02860a8fd0",
    239: "cb7a8da57ad8329249fb6a0a5210e031",
    240: "ad46c1021b076bc704e0b5f034bee80b",
    241: "ac6c3492c3d6b45d8beadd3a8874fe17",
    512: "806150a4e9a975780e5b5e129265c2c7",
    1024: "ed4745f2bc58bc68a6f1a01606138456",
    1025: "4d589146d3f9b41cecd2bad8e8ceb864",
    1088: "d95c1a437a654de8c7d84b42188f514f",
    1089: "b7696044ac4fe07c2390eecebe90a2bb",
    2048: "4164199d6919f239d9591a7a867bbf03",
    2049: "0695949818f3696545189093da197612",
    5000: "273318ec6f6cefe4242c1cf3b0a36594",
  },
};

const bytes = (n) => Uint8Array.from({ length: n }, (_, i) => (i * 7 + (i >> 8) * 13 + 3) & 255);
const refusal = (rule, message) => (error) => {
  assert.ok(error instanceof Refused);
  assert.equal(error.rule, rule);
  assert.equal(error.message, `${rule}: ${message}`);
  return true;
};

test("BLAKE2b of 16 bytes", () => {
  // The lengths lie around a block of 128.
  assert.equal(blake2b(bytes(0)), "cae66941d9efbd404e4d88758ea67670");
  assert.equal(blake2b(bytes(127)), HASHES.blake2b[127]);
  assert.equal(blake2b(bytes(128)), HASHES.blake2b[128]);
  assert.equal(blake2b(bytes(129)), HASHES.blake2b[129]);
  assert.equal(blake2b(bytes(5000)), HASHES.blake2b[5000]);
});

test("XXH3 of 128 bits, each of its branches, in pieces of any size", () => {
  for (const [length, digest] of Object.entries(HASHES.xxh3)) {
    for (const piece of [1, 64, 777, 1 << 20]) {
      const hash = new Xxh3();
      const data = bytes(Number(length));
      for (let at = 0; at < data.length; at += piece) hash.update(data.subarray(at, at + piece));
      assert.equal(hash.digest(), digest, `${length} bytes in pieces of ${piece}`);
    }
  }
});

test("JSON keeps integers and floats apart, and reads members of any name", () => {
  assert.deepEqual(parse(' [1, 1.0, -0.0, 1e2, 9007199254740992, "\\u0061\\n"] '), [
    1, new Float(1), new Float(-0), new Float(100), HUGE, "a\n",
  ]);
  const names = parse('{"__proto__": 1, "constructor": 2, "2": 3, "1": 4}');
  assert.deepEqual([...names], [["__proto__", 1], ["constructor", 2], ["2", 3], ["1", 4]]);
  assert.notEqual(canonical(parse("[1]")), canonical(parse("[1.0]")));
  assert.equal(canonical(parse('{"a":1,"b":2}')), canonical(parse('{"b":2,"a":1}')));
});

test("JSON that is too long or too deep is refused before it is built", () => {
  assert.equal(parse(`[${"0,".repeat(2_097_151)}0]`).length, 2_097_152);
  assert.throws(
    () => parse(`[${"0,".repeat(2_097_152)}0]`),
    refusal("R3", "more than 2097152 values, at character 4194304 of the JSON text"),
  );
  assert.throws(() => parse("[".repeat(65)), refusal("R3", "nesting of more than 64 levels, at character 64 of the JSON text"));
});

test("values have the types that the package says", async () => {
  const { extra, naming } = await openPath(join(VALID, "values.safetensors"));
  assert.deepEqual(extra.get("tuples"), Tuple.of(1n, Tuple.of(2n), [Tuple.of(3n, [4])]));
  assert.deepEqual(extra.get("bytes"), [new Uint8Array(0), Uint8Array.of(0, 255)]);
  assert.equal(extra.get("by number").get(0.5), "e");
  assert.equal(extra.get("by number").get(1152921504606846976n), "f");
  assert.ok(extra.get("scalar") instanceof Scalar);
  assert.equal(extra.get("scalar").item(), -5n);
  assert.equal(naming.rule, "hf_trainer");
});

test("tensors come as typed arrays", async () => {
  const state = await openPath(join(VALID, "dtypes.safetensors"));
  const described = JSON.parse(await readFile(join(VALID, "dtypes.json"), "utf8"));
  const sha256 = (data) => createHash("sha256").update(data).digest("hex");
  const types = {};
  for (const [key, tensor] of state.tensors) {
    assert.equal(sha256(await tensor.bytes()), described.tensors[key].sha256);
    types[tensor.dtype] = (await tensor.values()).constructor.name;
  }
  assert.equal(types.BF16, "Float32Array");
  assert.equal(types.I64, "BigInt64Array");
  assert.equal(types.F8_E4M3, "Uint8Array");
  assert.equal(new Scalar("F16", Uint8Array.of(0x55, 0x35)).item(), 0.333251953125);
  assert.equal(new Scalar("F16", Uint8Array.of(0x01, 0x80)).item(), -(2 ** -24));
  assert.equal(new Scalar("F16", Uint8Array.of(0x00, 0xfc)).item(), -Infinity);
  assert.equal(new Scalar("BF16", Uint8Array.of(0x49, 0x40)).item(), 3.140625);
});

test("a digest by another algorithm is not verified, and no error", async () => {
  const state = await openPath(join(VALID, "unknown-algorithm.safetensors"));
  assert.deepEqual(await verify(state), { verified: false, compared: 0, total: 1 });
});

test("a changed tensor is found when it is asked for", async () => {
  const state = await openPath(join(INVALID, "tensor-changed.safetensors"));
  await assert.rejects(verify(state), refusal("R21", 'the tensor "w/momentum" was changed'));
});

test("a shard alone says what to open", async () => {
  const set = join(VALID, "set");
  const shards = (await readdir(set)).filter((name) => name.endsWith(".safetensors")).sort();
  await assert.rejects(
    openPath(join(set, shards[1])),
    refusal("R23", "this is shard 2 of 3, and no state by itself: open the index of its set"),
  );
  const files = await Promise.all([...shards, "optimizer.safetensors.index.json"].map(async (name) =>
    new File([await readFile(join(set, name))], name)));
  const state = await open(fromBlob(files.at(-1)), async (name) => {
    const file = files.find((each) => each.name === name);
    return file ? fromBlob(file) : null;
  });
  assert.deepEqual(state.files, shards);
  assert.equal(state.parameters.length, 6);
  assert.deepEqual(await verify(state), { verified: true, compared: 13, total: 13 });
});

test("a comparison that is stopped reads nothing more", async () => {
  const state = await openPath(join(VALID, "set", "optimizer.safetensors"));
  const stop = new AbortController();
  const told = [];
  const stopped = verify(state, (...numbers) => {
    told.push(numbers);
    stop.abort();
  }, stop.signal);
  await assert.rejects(stopped, { name: "AbortError" });
  assert.deepEqual(told, [[1, 13]]);
  const [tensor] = state.tensors.values();
  await assert.rejects(tensor.verify(stop.signal), { name: "AbortError" });
});

test("a set that is replaced while it is read is read again", async () => {
  const whole = async (set, name) => fromBlob(new Blob([await readFile(join(VALID, set, name))]), name);
  const index = "optimizer.safetensors.index.json";
  let current = "set-out-of-order";
  const near = async (name) => {
    current = "set"; // behind the reader's back
    return (await readdir(join(VALID, current))).includes(name) ? whole(current, name) : null;
  };
  const found = () => whole(current, index);
  assert.equal((await openMeant(found, async () => null, near)).parameters.length, 6);
  await assert.rejects(openMeant(() => whole("set-of-one", index), async () => null, async () => null), {
    message: 'R25: the shard "optimizer-353b19f4-00001-of-00001.safetensors" is not there',
  });
});

test("a file that ends while it is read is an error", async () => {
  const path = join(folder, "short.safetensors");
  await copyFile(join(VALID, "example.safetensors"), path);
  const state = await openPath(path);
  await truncate(path, 1700);
  const tensor = [...state.tensors.values()].at(-1);
  await assert.rejects(tensor.bytes(), refusal("R6", `short.safetensors: bytes ${tensor.offset} to ${tensor.offset + 32} are not there`));
});

test("a path without a file", async () => {
  await assert.rejects(openPath(join(folder, "none")), { message: `${join(folder, "none")}: there is no such file` });
});

test("plain safetensors are read as a container", async () => {
  const path = join(folder, "model.safetensors");
  const header = Buffer.from('{"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}');
  const length = Buffer.alloc(8);
  length.writeUInt32LE(header.length);
  await writeFile(path, Buffer.concat([length, header, Buffer.of(255, 1, 2)]));
  const { metadata, tensors, digest } = await readContainer(await fromPath(path));
  assert.deepEqual([...metadata], [["format", "pt"]]);
  assert.equal(digest, null);
  assert.deepEqual([...tensors.keys()], ["a", "b"]);
  assert.deepEqual(await tensors.get("a").values(), Int8Array.of(-1));
  await assert.rejects(openPath(path), refusal("R7", "this is not named optimizer state"));
});

test("names are quoted harmlessly", () => {
  assert.equal(quoted("a\u202eb\u0007\u2028\ufeff<b>"), '"a\\u{202e}b\\u0007\\u{2028}\\u{feff}<b>"');
});

/** Serve a folder with Range requests, as a bucket or a Hub does; count the bytes that it sent. */
async function served(root, run) {
  const sent = { bytes: 0, requests: 0 };
  const server = createServer(async (request, response) => {
    sent.requests++;
    const name = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const whole = name === "/whole";
    const source = await fromPath(join(root, whole ? "example.safetensors" : name));
    if (source === null) return response.writeHead(404).end();
    if (whole) return response.writeHead(200).end(await source.read(0, source.size));
    const [, start, end] = request.headers.range.match(/^bytes=([0-9]+)-([0-9]+)$/).map(Number);
    const part = await source.read(start, Math.min(end + 1, source.size));
    sent.bytes += part.length;
    response.writeHead(206, { "Content-Range": `bytes ${start}-${start + part.length - 1}/${source.size}` }).end(part);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  try {
    await run(`http://127.0.0.1:${server.address().port}`, sent);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

test("URLs: a file, a set by its path, and servers that do not serve", async () => {
  await served(VALID, async (url) => {
    const state = await openURL(`${url}/example.safetensors`);
    assert.deepEqual(await verify(state), { verified: true, compared: 2, total: 2 });
    const set = await openURL(`${url}/set/optimizer.safetensors`);
    assert.deepEqual(await verify(set), { verified: true, compared: 13, total: 13 });
    await assert.rejects(openURL(`${url}/none`), { message: `${url}/none: there is no such file` });
    await assert.rejects(fromURL(`${url}/whole`), {
      message: `${url}/whole: the server does not answer Range requests, or hides the Content-Range header; download the file and open it`,
    });
  });
});

test("a large file over a URL costs its header only", async () => {
  const path = join(folder, "large.safetensors");
  const size = 1 << 30;
  const header = Buffer.from(`{"a":{"dtype":"U8","shape":[${size}],"data_offsets":[0,${size}]}}`);
  const length = Buffer.alloc(8);
  length.writeUInt32LE(header.length);
  const handle = await openHandle(path, "w");
  await handle.write(Buffer.concat([length, header]));
  await handle.truncate(8 + header.length + size);
  await handle.close();
  await served(folder, async (url, sent) => {
    const { tensors } = await readContainer(await fromURL(`${url}/large.safetensors`));
    assert.equal(tensors.get("a").byteLength, size);
    assert.ok(sent.bytes < 66_000);
    assert.equal(sent.requests, 2);
  });
});

test("changed headers, with the digest made anew, are read or refused", async () => {
  const names = (await readdir(VALID)).filter((name) => name.endsWith(".safetensors"));
  const found = { read: 0, refused: 0 };
  for (const name of names) {
    const whole = new Uint8Array(await readFile(join(VALID, name)));
    const end = 8 + Number(new DataView(whole.buffer).getBigUint64(0, true));
    for (let at = 90; at < end; at += 29) {
      const changed = whole.slice();
      changed[at] = '0-"{}[],:$e.\\ \xff'.charCodeAt(at % 15);
      changed.fill(0x30, 58, 90);
      changed.set(new TextEncoder().encode(blake2b(changed.subarray(0, end))), 58);
      try {
        await open(fromBlob(new Blob([changed]), name));
        found.read++;
      } catch (error) {
        assert.ok(error instanceof Refused, `${name}, byte ${at}: ${error.stack}`);
        found.refused++;
      }
    }
  }
  assert.ok(found.refused > 300 && found.read > 10, JSON.stringify(found));
});
