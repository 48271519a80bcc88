// Opens what was dropped, chosen or named, and says what went wrong.
import { Refused, fromBlob, fromURL, isIndex, open, openURL, readContainer } from "../readers/js/src/index.js";
import { element, shown } from "./dom.js";
import { showPlain, showState } from "./state.js";

const byId = (id) => document.getElementById(id);
const KINDS = {
  malformed: "The file is broken, or made by a program that does not follow the format.",
  digest: "The file was whole when it was written, and was changed since.",
  unsupported: "The file is made for a newer reader.",
};
let turn = 0;

/** Show what `read` gives; a later call wins over one that is still reading. */
async function present(name, read) {
  const own = ++turn;
  byId("problem").hidden = true;
  byId("state").hidden = true;
  byId("status").replaceChildren("Reading the header of ", shown(name), " …");
  const start = performance.now();
  try {
    const view = await read();
    if (own !== turn) return;
    byId("state").replaceChildren(...view);
    byId("state").hidden = false;
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    byId("status").replaceChildren(`Opened in ${seconds} s: `, shown(name));
  } catch (error) {
    if (own !== turn) return;
    byId("status").replaceChildren();
    const refused = error instanceof Refused;
    byId("problem").replaceChildren(
      element("p", {}, element("strong", {}, "Could not open "), shown(name)),
      element("p", {}, shown(error.message, "value")),
      element("p", {}, refused ? `${KINDS[error.kind]} ${error.rule} is a rule of the format.` : ""),
    );
    byId("problem").hidden = false;
    if (!refused) console.error(error);
  }
}

/** Read a state, or the header of plain safetensors. */
async function view(readState, source) {
  try {
    return showState(await readState());
  } catch (error) {
    const plain = error instanceof Refused && error.rule === "R7" && source !== null;
    if (!plain) throw error;
    const file = await source();
    return showPlain(await readContainer(file), file);
  }
}

function presentFiles(files) {
  if (files.length === 0) return;
  const named = new Map([...files].map((file) => [file.name, file]));
  const first = [...named.keys()].find(isIndex) ?? files[0].name;
  const near = async (name) => (named.has(name) ? fromBlob(named.get(name)) : null);
  const source = fromBlob(named.get(first));
  if (files.length > 1 && !isIndex(first)) {
    present(`${files.length} files`, async () => {
      throw new Error("Several files without an index: drop one file, or the .index.json of a set together with its shards.");
    });
    return;
  }
  present(first, () => view(() => open(source, near), isIndex(first) ? null : async () => source));
}

function presentURL(address) {
  const url = new URL(address, location.href);
  present(url.href, () => view(() => openURL(url), isIndex(url.pathname) ? null : () => fromURL(url)));
}

byId("files").addEventListener("change", (event) => presentFiles(event.target.files));
byId("url").addEventListener("submit", (event) => {
  event.preventDefault();
  presentURL(byId("address").value);
});
for (const kind of ["dragover", "dragenter", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover" || kind === "dragenter");
    if (kind === "drop") presentFiles(event.dataTransfer.files);
  });
}
byId("unstarted").hidden = true;
byId("open").hidden = false;
const asked = new URLSearchParams(location.search).get("url");
if (asked !== null) {
  byId("address").value = asked;
  presentURL(asked);
}
