// The heat maps of an answer, of which one is shown: of the latest picture, until another is chosen.

import { create, explain, name, say } from "./elements.js";
import { createHeatMap } from "./heat_map.js";
import { ServerError } from "./server.js";

/** The part of an answer that shows on which patches of a picture it depends. */
export class HeatView {
  /** `compute(index)` returns the promise of the map of one of `pictures`. */
  constructor(pictures, compute) {
    Object.assign(this, { pictures, compute });
    this.place = create("div");
    this.place.setAttribute("aria-live", "polite");
    this.buttons = pictures.map((picture, index) => this.createButton(picture, index));
    const list = create("ul", "thumbnails", ...this.buttons.map((one) => create("li", "", one)));
    list.hidden = pictures.length < 2;
    this.element = create("div", "map", list, this.place);
  }

  createButton(picture, index) {
    const image = create("img");
    image.src = picture.url;
    image.alt = "";
    const button = create("button", "thumbnail", image);
    button.type = "button";
    const values = { number: index + 1, name: picture.name };
    name(button, "pictureNumber", values);
    explain(button, "pictureNumber", values);
    button.addEventListener("click", () => this.show(index));
    return button;
  }

  /** Show the map of a picture; while one is computed nothing else is asked for. */
  async show(index) {
    if (this.isComputing) return;
    this.isComputing = true;
    for (const [number, button] of this.buttons.entries()) {
      button.setAttribute("aria-pressed", String(number === index));
    }
    this.place.replaceChildren(say(create("p", "faint"), "heatMapWaiting"));
    try {
      this.place.replaceChildren(createHeatMap(this.pictures[index], await this.compute(index)));
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.place.replaceChildren(say(create("p", "note wrong"), error.key, error.values));
    } finally {
      this.isComputing = false;
    }
  }
}
