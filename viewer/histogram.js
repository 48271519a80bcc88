// Statistics of a tensor, read piece by piece.
import { numbers } from "../readers/js/src/index.js";

const FLOATS = ["F16", "BF16", "F32", "F64"];
const CODES = ["U8", "I8", "BOOL"];
const PER_DECADE = 2;
const LOWEST = -330; // below the smallest float of 64 bits

/** Whether there is a histogram of a dtype. */
export const drawable = (dtype) => FLOATS.includes(dtype) || CODES.includes(dtype);

/**
 * Read a tensor and return what its elements are.
 *
 * @param {AbortSignal} [signal] ends it, which rejects the promise
 * @returns {Promise<object>} counts; `bars` are pairs of a label and a count: of magnitudes by half decades for floats, of
 *   eight codes for integers
 */
export async function statistics(tensor, signal) {
  const result = { elements: 0, zeros: 0, broken: 0, smallest: Infinity, largest: -Infinity, squares: 0 };
  const floats = FLOATS.includes(tensor.dtype);
  const bins = new Map();
  for await (const piece of tensor.pieces(signal)) {
    for (const value of numbers(tensor.dtype, piece)) {
      result.elements++;
      if (!Number.isFinite(value)) {
        result.broken++;
        continue;
      }
      if (value < result.smallest) result.smallest = value;
      if (value > result.largest) result.largest = value;
      result.squares += value * value;
      if (value === 0) result.zeros++;
      if (value === 0 && floats) continue;
      const bin = floats ? Math.floor(PER_DECADE * Math.log10(Math.abs(value))) : Math.floor(value / 8);
      bins.set(bin, (bins.get(bin) ?? 0) + 1);
    }
  }
  const used = [...bins.keys()].filter((bin) => bin > PER_DECADE * LOWEST);
  const bars = [];
  for (let bin = Math.min(...used); bin <= Math.max(...used); bin++) {
    bars.push([floats ? `1e${bin / PER_DECADE}` : `${8 * bin}`, bins.get(bin) ?? 0]);
  }
  return { ...result, bars, floats };
}

/** Return a drawing of bars, with its ends labelled. */
export function drawing({ bars, floats }, label) {
  const space = "http://www.w3.org/2000/svg";
  const make = (tag, attributes, text) => {
    const node = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const [width, height] = [480, 120];
  const svg = make("svg", { viewBox: `0 0 ${width} ${height + 18}`, class: "histogram", role: "img", "aria-label": label });
  const most = Math.max(...bars.map(([, n]) => n));
  const step = width / bars.length;
  bars.forEach(([name, n], i) => {
    const tall = n === 0 ? 0 : Math.max(1, (n / most) * height);
    const bar = make("rect", { x: i * step, y: height - tall, width: Math.max(step - 1, 0.5), height: tall });
    bar.append(make("title", {}, `from ${name}: ${n.toLocaleString("en")}`));
    svg.append(bar);
  });
  svg.append(make("line", { x1: 0, x2: width, y1: height, y2: height }));
  svg.append(make("text", { x: 0, y: height + 13 }, `${floats ? "magnitude " : ""}${bars[0][0]}`));
  svg.append(make("text", { x: width, y: height + 13, "text-anchor": "end" }, bars.at(-1)[0]));
  return svg;
}
