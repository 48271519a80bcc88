// Files on a disk, for node.
import { open as openHandle, stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { isIndex, openMeant } from "./open.js";

/** Return a source over a file, or null where there is none. */
export async function fromPath(path) {
  let size;
  try {
    const found = await stat(path);
    if (!found.isFile()) return null;
    size = found.size;
  } catch (error) {
    if (error.code === "ENOENT") return null;
    throw error;
  }
  const read = async (start, end) => {
    const handle = await openHandle(path);
    try {
      const bytes = new Uint8Array(end - start);
      let filled = 0;
      for (let n = 1; n > 0 && filled < bytes.length; filled += n) {
        n = (await handle.read(bytes, filled, bytes.length - filled, start + filled)).bytesRead;
      }
      return bytes.subarray(0, filled);
    } finally {
      await handle.close();
    }
  };
  return { name: basename(path), size, read };
}

/** Open the state that a path means: its index if there is one, else the file. */
export async function openPath(path) {
  const near = (name) => fromPath(join(dirname(path), name));
  const findIndex = () => fromPath(isIndex(path) ? path : `${path}.index.json`);
  const state = await openMeant(findIndex, async () => (isIndex(path) ? null : fromPath(path)), near);
  if (state === null) throw new Error(`${path}: there is no such file`);
  return state;
}
