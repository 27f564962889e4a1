// The served models: which of them answer, and what is known of each.

import { create, name, say, sayComposed, translate, write } from "./elements.js";
import { formatFlops } from "./messages.js";

/** The choice of models in the head of the page; with one model there is nothing to choose. */
export class ModelList {
  constructor(element, models, onChange) {
    this.models = models;
    if (models.length === 1) {
      element.append(write(create("span", "chip"), models[0].id));
      this.boxes = [];
      return;
    }
    this.boxes = models.map((model) => {
      const box = create("input");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        if (!this.chosen().length) box.checked = true; // somebody has to answer
        onChange();
      });
      element.append(create("label", "chip", box, write(create("span"), model.id)));
      return box;
    });
  }

  /** Return the models that answer. */
  chosen() {
    return this.models.filter((_, index) => this.boxes[index]?.checked ?? true);
  }
}

/** Return a table of what is known of each model. */
export function createModelTable(models) {
  const columns = ["modelColumn", "connectorColumn", "tokensColumn", "sizeColumn", "flopsColumn"];
  const heads = columns.map((key, index) => {
    const cell = say(create("th", index < 2 ? "" : "n"), key);
    cell.scope = "col";
    return cell;
  });
  const rows = models.map((model) => {
    const head = write(create("th"), model.id);
    head.scope = "row";
    const size = create("td", "n");
    sayComposed(size, () => translate("pixels", { side: model.image_size }));
    return create(
      "tr",
      "",
      head,
      write(create("td"), model.connector),
      write(create("td", "n"), tokensOfPicture(model)),
      size,
      write(create("td", "n"), formatFlops(flopsOfPicture(model))),
    );
  });
  const body = create("tbody", "", ...rows);
  const table = create("table", "", create("thead", "", create("tr", "", ...heads)), body);
  const box = create("div", "box", table);
  box.setAttribute("role", "region");
  box.tabIndex = 0; // it may scroll sideways
  return name(box, "models");
}

/** Return how many tokens a picture has, such as "16" or, of a tiled one, "16 × 1–5". */
function tokensOfPicture({ visual_tokens_per_image: tokens, most_views_per_image: views }) {
  return views > 1 ? `${tokens} × 1–${views}` : String(tokens);
}

/** Return the operations that a picture takes at most: encoder, connector, image positions. */
function flopsOfPicture(model) {
  const { flops, most_views_per_image: views } = model;
  const tokens = model.visual_tokens_per_image * views;
  return (
    flops.view * views +
    flops.position * tokens +
    (flops.attended_pair * tokens * (tokens + 1)) / 2
  );
}
