// Where bytes come from. A source is {name, size, read(start, end)}; `read` gives a Promise of a Uint8Array.
import { check } from "./errors.js";

/** Return a source over a Blob or File. */
export function fromBlob(blob, name = blob.name ?? "file") {
  return { name, size: blob.size, read: async (start, end) => new Uint8Array(await blob.slice(start, end).arrayBuffer()) };
}

/**
 * Return a source over a URL, read with Range requests, or null where the server answers 404.
 *
 * @param {string | URL} url
 * @param {RequestInit} [options] handed to every fetch: headers, credentials
 */
export async function fromURL(url, options = {}) {
  const get = async (start, end) => {
    const headers = new Headers(options.headers);
    headers.set("Range", `bytes=${start}-${end - 1}`);
    return fetch(url, { ...options, headers });
  };
  const response = await get(0, 1);
  if (response.status === 404) return null;
  const range = response.headers.get("Content-Range")?.match(/^bytes 0-0\/([0-9]+)$/);
  await response.body?.cancel();
  if (response.status !== 206 || range == null) {
    throw new Error(
      response.ok
        ? `${url}: the server does not answer Range requests, or hides the Content-Range header; download the file and open it`
        : `${url}: HTTP status ${response.status}`,
    );
  }
  const read = async (start, end) => {
    if (start === end) return new Uint8Array(0);
    const part = await get(start, end);
    if (part.status !== 206) throw new Error(`${url}: HTTP status ${part.status} for bytes ${start} to ${end}`);
    return new Uint8Array(await part.arrayBuffer());
  };
  return { name: decodeURIComponent(new URL(url).pathname.split("/").pop()), size: Number(range[1]), read };
}

/** Read bytes of a source, all of them or an error. */
export async function exactly(source, start, end, rule) {
  const bytes = await source.read(start, end);
  check(bytes.length === end - start, rule, () => `${source.name}: bytes ${start} to ${end} are not there`);
  return bytes;
}
