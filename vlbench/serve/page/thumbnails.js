// Pictures of a question that can still be taken away: small, each a button that removes it.

import { create, explain, name } from "./elements.js";

/** Show `pictures` in a list; a click removes one from the array, and `onRemoved()` is called. */
export function showThumbnails(list, pictures, onRemoved) {
  const items = pictures.map((picture, index) => {
    const image = create("img");
    image.src = picture.url;
    image.alt = "";
    const button = create("button", "thumbnail", image);
    button.type = "button";
    name(button, "removePicture", { name: picture.name });
    explain(button, "removePicture", { name: picture.name });
    button.addEventListener("click", () => {
      pictures.splice(index, 1);
      showThumbnails(list, pictures, onRemoved);
      onRemoved();
    });
    return create("li", "", button);
  });
  list.replaceChildren(...items);
  list.hidden = items.length === 0;
}
