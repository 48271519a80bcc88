// Named optimizer state in JavaScript: for browsers and node 18 or newer, without packages. The text is spec/format.md.
export { Refused, quoted } from "./errors.js";
export { Tensor, numbers, readContainer } from "./container.js";
export { Scalar, Slot, Tuple } from "./values.js";
export { fromBlob, fromURL } from "./sources.js";
export { isIndex, open, openURL, verify } from "./open.js";
