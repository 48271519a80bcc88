/** A file that breaks a rule of spec/format.md. */
export class Refused extends Error {
  /**
   * @param {string} rule the id of the broken rule, such as "R9"
   * @param {string} message what is wrong, and where
   * @param {"malformed" | "digest" | "unsupported"} kind the way of refusing (section 1)
   */
  constructor(rule, message, kind = "malformed") {
    super(`${rule}: ${message}`);
    this.name = "Refused";
    this.rule = rule;
    this.kind = kind;
  }
}

/** Throw `Refused` unless the condition holds; `message` is text, or a function that makes it. */
export function check(condition, rule, message, kind = "malformed") {
  if (!condition) throw new Refused(rule, typeof message === "string" ? message : message(), kind);
}

/** Return a name for a message: quoted, with control characters and marks of direction escaped. */
export function quoted(name) {
  const unsafe = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;
  return JSON.stringify(String(name)).replace(unsafe, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
}
