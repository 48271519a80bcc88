import type { Source, State } from "./index.js";

/** Return a source over a file, or null where there is none. */
export function fromPath(path: string): Promise<Source | null>;

/** Open the state that a path means: its index if there is one, else the file. */
export function openPath(path: string): Promise<State>;
