// Checked by `npm run types`, never run: a program in TypeScript that uses all of index.d.ts and node.d.ts.
import {
  Refused, Scalar, Slot, Tuple, fromBlob, fromURL, isIndex, numbers, open, openURL, quoted, readContainer, verify,
  type Elements, type Source, type State, type Value,
} from "named-optimizer-state";
import { fromPath, openPath } from "named-optimizer-state/node";

const state: State = await openPath("optimizer.safetensors");
for (const { name, slots, group } of state.parameters.map((each) => ({ ...each, group: state.groups[0]?.options.get("lr") }))) {
  const slot: Value | undefined = slots?.get("exp_avg");
  if (slot instanceof Slot) {
    const elements: Elements = await slot.tensor.values();
    for await (const piece of slot.tensor.pieces()) console.log(numbers(slot.tensor.dtype, piece).length);
    const same: true | null = await slot.tensor.verify();
    console.log(quoted(name), slot.role, elements.BYTES_PER_ELEMENT, same, group);
  } else if (slot instanceof Scalar) {
    console.log(slot.item());
  } else if (slot instanceof Tuple) {
    console.log(slot.length);
  }
}
const { verified }: { verified: boolean } = await verify(state, (done, total) => console.log(done / total));
const remote: State = await openURL("https://example.org/optimizer.safetensors", { headers: { Authorization: "" } });
const source: Source | null = (await fromPath("a")) ?? (await fromURL("https://example.org/a"));
try {
  const local: State = await open(fromBlob(new Blob([]), "a.index.json"), async (name) => (isIndex(name) ? null : source));
  console.log(verified, remote.files, local.globalStep);
  if (source !== null) console.log((await readContainer(source)).tensors.size);
} catch (error) {
  if (error instanceof Refused) console.log(error.rule, error.kind);
}
