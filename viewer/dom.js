// Everything that a file says becomes a text node: no markup of a file is ever parsed.

/** Return an element with attributes and children; a child that is not a node becomes text. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const ROOM = 2000; // characters of a text that are shown
const UNSAFE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}]/gu;

/** Return a file's text, apart from the text around it, with control characters and marks of direction written out. */
export function shown(whole, kind = "name") {
  const text = whole.slice(0, ROOM);
  const parts = [];
  let at = 0;
  for (const { 0: char, index } of text.matchAll(UNSAFE)) {
    const code = char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(text.slice(at, index), element("span", { class: "escape" }, `U+${code}`));
    at = index + char.length;
  }
  const cut = whole.length > ROOM ? element("span", { class: "faint" }, `… (${whole.length.toLocaleString("en")} characters)`) : null;
  return element("bdi", { class: kind, dir: "ltr" }, parts, text.slice(at), cut);
}

/** Return pairs of a term and its description. */
export function terms(pairs) {
  return element("dl", {}, pairs.filter(Boolean).map(([term, description]) => [element("dt", {}, term), element("dd", {}, description)]));
}

/** Return a panel with a heading. */
export function panel(heading, ...children) {
  return element("section", { class: "panel" }, element("h2", {}, heading), ...children);
}
