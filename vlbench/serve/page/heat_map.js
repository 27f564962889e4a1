// The heat map of an answer: its patches over the picture, greyed, as in the report of a comparison.

import { create, name, say } from "./elements.js";

const COLOUR = "213 94 0"; // Okabe and Ito's vermilion, as in the report
const OPACITY = 0.85; // of the patch on which the answer depends most

/** Return a figure of a picture under the patches of a map {rows, box}. */
export function createHeatMap(picture, { rows, box }) {
  if (!rows) return say(create("p", "faint"), "heatMapNone");
  const image = create("img");
  image.src = picture.url;
  image.alt = "";
  const frame = create("div", "heat", image, drawPatches(rows, box));
  frame.style.setProperty("--ratio", picture.width / picture.height);
  frame.setAttribute("role", "img");
  name(frame, "heatMapOf", { name: picture.name });
  return create("figure", "heat-map", frame, say(create("figcaption"), "heatMapCaption"));
}

function drawPatches(rows, [left, top, right, bottom]) {
  const canvas = create("canvas");
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d");
  const largest = Math.max(...rows.flat(), 1e-12);
  for (const [y, row] of rows.entries()) {
    for (const [x, share] of row.entries()) {
      context.fillStyle = `rgb(${COLOUR} / ${(OPACITY * share) / largest})`;
      context.fillRect(x, y, 1, 1);
    }
  }
  // shares of the picture's width and height; what lies outside of the picture is cut off
  Object.assign(canvas.style, {
    left: `${100 * left}%`,
    top: `${100 * top}%`,
    width: `${100 * (right - left)}%`,
    height: `${100 * (bottom - top)}%`,
  });
  return canvas;
}
