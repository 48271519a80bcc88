// The parser of @huggingface/hub, which the Hub's pages use, on the files of the vectors; where it is installed.
import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { test } from "node:test";

const VALID = fileURLToPath(new URL("../../../spec/vectors/valid/", import.meta.url));
const hub = await import("@huggingface/hub").catch(() => null);
const skip = hub === null && "@huggingface/hub is not installed: npm install";

/** Answer as the Hub does, with one file. */
function serving(bytes) {
  return async (url, options = {}) => {
    if (!String(url).includes("/resolve/")) return new Response("{}", { status: 404 });
    const range = new Headers(options.headers).get("Range")?.match(/^bytes=([0-9]+)-([0-9]+)$/);
    const [start, end] = range ? [Number(range[1]), Math.min(Number(range[2]) + 1, bytes.length)] : [0, bytes.length];
    const headers = { ETag: '"etag"', "Content-Range": `bytes ${start}-${end - 1}/${bytes.length}`, "Content-Length": String(end - start) };
    return new Response(bytes.subarray(start, end), { status: range ? 206 : 200, headers });
  };
}

const parsed = (bytes) => hub.parseSafetensorsMetadata({
  repo: "someone/run", path: "optimizer.safetensors", hubUrl: "http://localhost", fetch: serving(bytes),
});

test("@huggingface/hub parses the vectors", { skip }, async () => {
  const names = (await readdir(VALID)).filter((name) => name.endsWith(".safetensors"));
  assert.ok(names.length >= 20);
  for (const name of names) {
    const { header } = await parsed(await readFile(VALID + name));
    const { tensors } = JSON.parse(await readFile(VALID + name.replace(/safetensors$/, "json"), "utf8"));
    const { __metadata__: metadata, ...entries } = header;
    assert.deepEqual(Object.keys(metadata), ["optimizer_state"]);
    assert.deepEqual(Object.keys(entries).sort(), Object.keys(tensors).sort(), name);
    for (const [key, { dtype, shape }] of Object.entries(entries)) {
      assert.deepEqual({ dtype, shape }, { dtype: tensors[key].dtype, shape: tensors[key].shape });
    }
  }
});

test("@huggingface/hub stops at 25,000,000 bytes of header", { skip }, async () => {
  for (const length of [25_000_000, 25_000_001]) {
    const bytes = Buffer.alloc(8 + length, " ");
    bytes.writeBigUInt64LE(BigInt(length));
    bytes.write('{"__metadata__":{}}', 8);
    if (length === 25_000_000) assert.deepEqual((await parsed(bytes)).header, { __metadata__: {} });
    else await assert.rejects(parsed(bytes), /header is too big/);
  }
});
