// The view of an open state.
import { Refused, Scalar, Slot, verify } from "../readers/js/src/index.js";
import { element, panel, shown, terms } from "./dom.js";
import { drawable, drawing, statistics } from "./histogram.js";
import { bytes, count, naming, role, value } from "./words.js";

const PAGE = 200; // rows that are added at a time
const DEEPEST = 24; // levels of the tree of modules
const shape = (sizes) => (sizes.length === 0 ? "no axes" : sizes.join(" × "));
const total = (tensors) => tensors.reduce((sum, tensor) => sum + tensor.byteLength, 0);

/**
 * Return a button that runs something, and shows in its place what it gives or what went wrong. Another button, which is there
 * meanwhile, stops it; so does another file in the page's place.
 */
function action(label, run) {
  const button = element("button", { type: "button" }, label);
  const note = element("span", { role: "status" });
  button.addEventListener("click", async () => {
    const controller = new AbortController();
    const stop = element("button", { type: "button", onclick: () => controller.abort() }, "Stop");
    const say = (text) => {
      button.textContent = text;
      if (!button.isConnected) controller.abort();
    };
    button.disabled = true;
    button.textContent = `${label} …`;
    note.replaceChildren(" ", stop);
    button.after(note);
    let result;
    try {
      result = await run(say, controller.signal);
    } catch (error) {
      if (controller.signal.aborted) {
        note.replaceChildren(" Stopped.");
        button.textContent = label;
        button.disabled = false;
        button.focus({ preventScroll: true });
        return;
      }
      result = [element("span", { class: "bad" }, shown(error.message, "value"))];
      if (!(error instanceof Refused)) console.error(error);
    }
    note.remove();
    const place = element("div", { role: "status", tabindex: "-1" }, result);
    button.replaceWith(place);
    place.focus({ preventScroll: true });
  });
  return button;
}

// --- a state -----------------------------------------------------------------------------------------------------------

/** Return the panels of a state. */
export function showState(state) {
  const groups = state.groups.flatMap((group, n) => new Array(Math.min(group.count, state.parameters.length)).fill(n));
  const rows = state.parameters.map((parameter, n) => ({ ...parameter, group: groups[n] ?? null, position: n, size: total(tensorsOf(parameter.slots)) }));
  return [summary(state, rows), showGroups(state), showNaming(state), parameters(rows, state), ...rest(state)];
}

function tensorsOf(value) {
  if (value instanceof Slot) return [value.tensor];
  if (value instanceof Map) return [...value.values()].flatMap(tensorsOf);
  return Array.isArray(value) ? value.flatMap(tensorsOf) : [];
}

function summary(state, rows) {
  const never = rows.filter(({ slots }) => slots === null).length;
  const carried = rows.filter(({ group }) => group === null).length;
  const tensors = [...state.tensors.values()];
  const algorithms = new Set(tensors.map(({ digest }) => digest.algorithm));
  const unknown = [...algorithms].filter((algorithm) => algorithm !== "xxh3-128");
  const check = tensors.length === 0 ? "none" : action(`Compare all ${count(tensors.length, "tensor")} (${bytes(total(tensors))})`, async (say, signal) => {
    const progress = (done, all) => say(`${done.toLocaleString("en")} of ${count(all, "tensor")} compared …`);
    const { verified, compared } = await verify(state, progress, signal);
    return verified
      ? element("span", { class: "good" }, `All ${count(compared, "tensor")} are as they were written.`)
      : element("span", { class: "warn" }, `${count(compared, "tensor")} compared; digests by `, unknown.map((name) => shown(name)), " are not known here.");
  });
  return panel("Summary", terms([
    ["Format", `named optimizer state, version ${state.version}`],
    ["Header", element("span", { class: "good" }, `its digest was checked and matches${state.files.length > 1 ? `, in all ${state.files.length} files` : ""}`)],
    state.globalStep === null ? null : ["Step", state.globalStep.toLocaleString("en")],
    ["Optimizers", element("span", {}, state.optimizers.map((each, n) => [n > 0 ? ", " : "", each.class === null ? "class not known" : shown(each.class)]).flat())],
    ["Parameters", [count(rows.length, "parameter"), never > 0 ? `; ${never.toLocaleString("en")} never stepped` : "", carried > 0 ? `; ${carried.toLocaleString("en")} carried, in no group any more` : ""].join("")],
    ["Tensors", `${count(tensors.length, "tensor")}, ${bytes(total(tensors))}`],
    ["Digests", check],
    state.origin.size > 0 ? ["Made from", shown(value(state.origin), "value")] : null,
  ]));
}

function showGroups(state) {
  const names = [...new Set(state.groups.flatMap(({ options }) => [...options.keys()]))];
  const rows = state.groups.map((group, n) => element("tr", {},
    element("td", {}, String(n), group.name === null ? "" : " ", group.name === null ? "" : shown(group.name)),
    element("td", {}, group.count.toLocaleString("en")),
    state.optimizers.length > 1 ? element("td", {}, String(group.optimizer)) : null,
    names.map((name) => element("td", {}, group.options.has(name) ? shown(value(group.options.get(name), 120), "value") : ""))));
  const heads = ["Group", "Parameters", state.optimizers.length > 1 ? "Optimizer" : null].filter(Boolean);
  const head = element("tr", {}, [...heads, ...names.map((name) => shown(name))].map((each) => element("th", { scope: "col" }, each)));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, rows));
  return panel("Groups", state.groups.length === 0 ? "There are no groups." : element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Groups" }, table));
}

function showNaming(state) {
  const sentences = naming(state.naming).map((parts) =>
    element("p", {}, parts.map((part) => (typeof part === "string" ? part : shown(part.text)))));
  const weights = state.parameters.filter((parameter) => parameter.weights !== null).length;
  const paired = weights > 0
    ? `Digests of the weights of ${count(weights, "parameter")} are kept, so that whoever loads the state can tell whether the weights are those that it belongs to.`
    : "No digests of the weights are kept, so the state cannot be paired with weights by their bytes.";
  const { details } = state.naming;
  const more = details.size === 0 ? null
    : element("details", {}, element("summary", {}, "Everything that is kept on the naming"), entries(details));
  return panel("Names and evidence", ...sentences, element("p", {}, paired), more);
}

/** Return the entries of a mapping, a line each. */
function entries(mapping) {
  return element("ul", { class: "slots" }, [...mapping].map(([key, item]) =>
    element("li", {}, shown(typeof key === "string" ? key : value(key)), ": ", item instanceof Map && item.size > 0 ? entries(item) : shown(value(item), "value"))));
}

function rest(state) {
  const found = [];
  if (state.globals.size > 0) found.push(panel("State of no one parameter", slots(state.globals)));
  if (state.extra.size > 0) found.push(panel("Kept by the user", entries(state.extra)));
  if (state.extensions.size > 0) found.push(panel("Extensions", entries(state.extensions)));
  return found;
}

// --- slots -------------------------------------------------------------------------------------------------------------

/** Return a slot tree as a list. */
function slots(tree) {
  const pairs = tree instanceof Map ? [...tree] : [...tree.entries()];
  if (pairs.length === 0) return element("p", {}, "The optimizer keeps no slots for it.");
  return element("ul", { class: "slots" }, pairs.map(([key, item]) => {
    const name = shown(typeof key === "string" ? key : typeof key === "number" ? String(key) : value(key));
    if (item instanceof Slot) return element("li", {}, name, ": ", tensor(item.tensor, item.role));
    if (item instanceof Map && item.size > 0) return element("li", {}, name, slots(item));
    if (Array.isArray(item) && tensorsOf(item).length > 0) return element("li", {}, name, slots(item));
    return element("li", {}, name, " = ", item instanceof Scalar ? scalar(item) : shown(value(item), "value"));
  }));
}

const scalar = (item) => element("span", {}, shown(String(item.item()), "value"), element("span", { class: "faint" }, ` ${item.dtype}, a tensor without axes`));

function tensor(found, roleName = null) {
  const meaning = roleName === null ? "" : ` — ${roleName}: ${role(roleName)}`;
  const tools = element("div", { class: "line" });
  if (found.digest !== null) {
    tools.append(action("Compare digest", async (say, signal) =>
      (await found.verify(signal))
        ? element("span", { class: "good" }, `As it was written (${found.digest.algorithm} ${found.digest.value}).`)
        : element("span", { class: "warn" }, "Not verified: ", shown(found.digest.algorithm), " is not known here.")));
  }
  if (drawable(found.dtype) && found.byteLength > 0) tools.append(action("Histogram", async (say, signal) => histogram(found, signal)));
  return element("span", {}, element("span", { class: "value" }, `${found.dtype} ${shape(found.shape)}`),
    element("span", { class: "faint" }, `, ${bytes(found.byteLength)}${meaning}`), tools);
}

async function histogram(found, signal) {
  const numbers = await statistics(found, signal);
  const [least, most] = [numbers.smallest, numbers.largest].map((number) => number.toPrecision(4));
  const rms = Math.sqrt(numbers.squares / Math.max(numbers.elements - numbers.broken, 1)).toPrecision(4);
  const finite = numbers.elements > numbers.broken ? `from ${least} to ${most}, root mean square ${rms}` : "none is finite";
  const words = `${count(numbers.elements, "element")}, ${finite}; ${numbers.zeros.toLocaleString("en")} zero`;
  const broken = numbers.broken > 0 ? element("strong", { class: "bad" }, `; ${numbers.broken.toLocaleString("en")} not finite`) : "";
  return [element("span", {}, words, broken), numbers.bars.length > 0 ? drawing(numbers, `Histogram: ${words}`) : ""];
}

// --- parameters --------------------------------------------------------------------------------------------------------

const ORDERS = {
  position: ["in the optimizer's order", (a, b) => a.position - b.position],
  name: ["by name", (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0)],
  size: ["largest state first", (a, b) => b.size - a.size || a.position - b.position],
  elements: ["most elements first", (a, b) => product(b.shape) - product(a.shape) || a.position - b.position],
};
const product = (sizes) => sizes.reduce((all, size) => all * size, 1);

function facts(row) {
  const kept = row.slots === null ? "never stepped" : row.slots.size === 0 ? "no slots" : [...row.slots.keys()].filter((key) => typeof key === "string").join(", ");
  const group = row.group === null ? "carried" : `group ${row.group}`;
  return [`${row.dtype ?? ""} ${shape(row.shape)} · ${group} · `, shown(kept.length > 100 ? `${kept.slice(0, 100)}…` : kept), ` · ${bytes(row.size)}`];
}

/** Return the list and the tree of parameters, next to the place of the one that is looked at. */
function parameters(rows, state) {
  const search = element("input", { type: "search", "aria-label": "Search names", placeholder: "Search names", spellcheck: "false" });
  const order = element("select", { "aria-label": "Order" }, Object.entries(ORDERS).map(([key, [label]]) => element("option", { value: key }, label)));
  const form = element("select", { "aria-label": "View" }, element("option", { value: "tree" }, "tree by module"), element("option", { value: "list" }, "list"));
  const found = element("p", { class: "faint", role: "status" });
  const place = element("div", { class: "results" });
  const detail = element("section", { class: "panel", id: "detail", tabindex: "-1", "aria-label": "Parameter" }, element("p", { class: "faint" }, "Choose a parameter to see its slots."));
  let current = null;

  const pick = (button, row) => {
    current?.setAttribute("aria-current", "false");
    current = button;
    button.setAttribute("aria-current", "true");
    detail.replaceChildren(...one(row, state));
    detail.scrollTop = 0;
    detail.focus({ preventScroll: true });
    detail.scrollIntoView({ block: "nearest" });
  };
  const line = (row, label = row.name) => {
    const button = element("button", { type: "button", class: "row", "aria-current": "false" }, shown(label), element("span", { class: "faint" }, facts(row)));
    button.addEventListener("click", () => pick(button, row));
    return button;
  };
  const draw = () => {
    const wanted = search.value.toLowerCase();
    const matching = rows.filter(({ name, tied }) => [name, ...tied].some((each) => each.toLowerCase().includes(wanted)));
    matching.sort(ORDERS[order.value][1]);
    found.textContent = wanted === "" ? count(rows.length, "parameter") : `${count(matching.length, "parameter")} of ${rows.length.toLocaleString("en")}`;
    const tree = form.value === "tree" && wanted === "";
    place.replaceChildren(tree ? branch(matching, 0, line) : listing(matching, line));
  };
  for (const control of [search, order, form]) control.addEventListener("input", draw);
  place.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step === undefined) return;
    const stops = [...place.querySelectorAll("button, summary")].filter((stop) => stop.checkVisibility());
    const next = stops[stops.indexOf(document.activeElement) + step];
    if (next === undefined) return;
    event.preventDefault();
    next.focus();
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") current?.focus();
  });
  draw();
  return element("div", { class: "columns" }, panel("Parameters", element("div", { class: "tools" }, search, order, form), found, place), detail);
}

/** Return a list that grows on request. */
function listing(rows, line) {
  const list = element("ul", { class: "list" });
  const grow = () => {
    const start = list.children.length;
    list.append(...rows.slice(start, start + PAGE).map((row) => element("li", {}, line(row))));
    more.hidden = list.children.length === rows.length;
    more.textContent = `Show ${count(Math.min(PAGE, rows.length - list.children.length), "more", "more")}`;
    list.children[start]?.querySelector("button, summary").focus();
  };
  const more = element("button", { type: "button", onclick: grow });
  list.append(...rows.slice(0, PAGE).map((row) => element("li", {}, line(row))));
  more.hidden = rows.length <= PAGE;
  more.textContent = `Show ${count(Math.min(PAGE, rows.length - PAGE), "more", "more")}`;
  return element("div", {}, list, more);
}

/** Return rows as a tree of the segments of their names, from the character `from` on; branches are made when they open. */
function branch(rows, from, line, depth = 0) {
  const children = new Map();
  for (const row of rows) {
    const dot = depth < DEEPEST ? row.name.indexOf(".", from) : -1;
    const segment = dot < 0 ? null : row.name.slice(from, dot);
    const key = segment ?? row;
    if (!children.has(key)) children.set(key, []);
    children.get(key).push(row);
  }
  const nodes = [...children].map(([segment, members]) => {
    if (typeof segment !== "string") return element("li", {}, line(segment, segment.name.slice(from)));
    const start = common(members, from);
    if (members.length === 1) return element("li", {}, line(members[0], members[0].name.slice(from)));
    const label = members[0].name.slice(from, start - 1);
    const node = element("details", { class: "branch" }, element("summary", {}, shown(label), element("span", { class: "faint" }, ` ${count(members.length, "parameter")}, ${bytes(members.reduce((sum, row) => sum + row.size, 0))}`)));
    node.addEventListener("toggle", () => {
      if (node.open && node.children.length === 1) node.append(branch(members, start, line, depth + 1));
    });
    return element("li", {}, node);
  });
  if (nodes.length <= PAGE) return element("ul", { class: "list" }, nodes);
  const list = element("ul", { class: "list" }, nodes.slice(0, PAGE));
  const more = element("button", { type: "button" }, `Show ${count(nodes.length - PAGE, "more", "more")}`);
  more.addEventListener("click", () => {
    list.append(...nodes.slice(PAGE));
    more.remove();
  });
  return element("div", {}, list, more);
}

/** Return where the names of rows begin to differ: behind the last dot that they share. */
function common(rows, from) {
  const first = rows[0].name;
  let end = first.length;
  for (const { name } of rows) {
    let at = from;
    while (at < end && name[at] === first[at]) at++;
    end = at;
  }
  return first.lastIndexOf(".", end - 1) + 1;
}

function one(row, state) {
  const group = row.group === null ? null : state.groups[row.group];
  const optimizer = group === null ? null : state.optimizers[group.optimizer].class;
  return [
    element("h2", {}, shown(row.name)),
    terms([
      ["Shape", `${shape(row.shape)}${row.dtype === null ? "" : `, ${row.dtype}`}`],
      ["Place", row.group === null ? `number ${row.position}; carried, in no group any more` : `number ${row.position}, in group ${row.group}`],
      optimizer === null ? null : ["Optimizer", shown(optimizer)],
      row.adapter === null ? null : ["Adapter", shown(row.adapter)],
      row.id === null ? null : ["Id in the file before", shown(String(row.id))],
      row.tied.length === 0 ? null : ["Also called", element("span", {}, row.tied.map((name, n) => [n > 0 ? ", " : "", shown(name)]).flat())],
      ...[...row.keys].map(([by, key]) => [element("span", {}, "Called by ", shown(by)), shown(key)]),
      row.weights === null ? null : ["Digest of its weights", shown(`${row.weights.dtype} ${row.weights.algorithm} ${row.weights.value}`, "value")],
    ]),
    element("h3", {}, "Slots"),
    row.slots === null ? element("p", {}, "None: the optimizer never made a step with it.") : slots(row.slots),
  ];
}

// --- plain safetensors -------------------------------------------------------------------------------------------------

/** Return the panels of a safetensors file that is not named optimizer state. */
export function showPlain({ metadata, tensors }, source) {
  const rows = [...tensors.values()].map((found) => ({ name: found.key, dtype: found.dtype, shape: found.shape, tensor: found }));
  const kept = metadata.size === 0 ? null : ["Metadata", entries(metadata)];
  return [
    panel("Summary", terms([
      ["Format", "plain safetensors: it is not named optimizer state, so there are no groups, no steps and no digests"],
      ["Size", bytes(source.size)],
      ["Tensors", `${count(rows.length, "tensor")}, ${bytes(total([...tensors.values()]))}`],
      kept,
    ])),
    plainTensors(rows),
  ];
}

function plainTensors(rows) {
  const search = element("input", { type: "search", "aria-label": "Search names", placeholder: "Search names", spellcheck: "false" });
  const found = element("p", { class: "faint", role: "status" });
  const place = element("div");
  const line = (row) => element("details", {}, element("summary", {}, shown(row.name), element("span", { class: "faint" }, ` ${row.dtype} ${shape(row.shape)}`)), tensor(row.tensor));
  const draw = () => {
    const wanted = search.value.toLowerCase();
    const matching = rows.filter(({ name }) => name.toLowerCase().includes(wanted));
    found.textContent = wanted === "" ? count(rows.length, "tensor") : `${count(matching.length, "tensor")} of ${rows.length.toLocaleString("en")}`;
    place.replaceChildren(listing(matching, line));
  };
  search.addEventListener("input", draw);
  draw();
  return panel("Tensors", element("div", { class: "tools" }, search), found, place);
}
