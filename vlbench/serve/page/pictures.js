// Pictures from files: what is sent is the file itself, byte by byte, so that the model gets what
// an evaluation would give it. Only photographs that were taken turned are drawn anew, upright.

const ORIENTATION_TAG = 0x0112;

/** Return {name, url, width, height} of an image file; null if the browser cannot show it. */
export async function readPicture(file) {
  const name = file.name || "image";
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const upright = readOrientation(bytes) > 1 ? await drawUpright(file) : file;
    const url = await readDataUrl(upright);
    const image = new Image();
    image.src = url;
    await image.decode();
    return { name, url, width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    return null; // no image, a broken one, or a format that this browser lacks
  }
}

/** Return a picture of the same size in one colour [red, green, blue], as evaluations ask with. */
export function blankPicture({ width, height }, [red, green, blue]) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = `rgb(${red} ${green} ${blue})`;
  context.fillRect(0, 0, width, height);
  return { name: "blank.png", url: canvas.toDataURL("image/png"), width, height };
}

function readDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function drawUpright(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}

/** Return the EXIF orientation of a JPEG file, 1 where it has none. */
export function readOrientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.byteLength < 4 || view.getUint16(0) !== 0xffd8) return 1;
  let at = 2;
  while (at + 18 < view.byteLength && view.getUint8(at) === 0xff) {
    const isExif = view.getUint16(at) === 0xffe1 && view.getUint32(at + 4) === 0x45786966;
    if (isExif) return orientationOf(view, at + 10);
    at += 2 + view.getUint16(at + 2);
  }
  return 1;
}

function orientationOf(view, start) {
  const little = view.getUint16(start) === 0x4949;
  const directory = start + view.getUint32(start + 4, little);
  if (directory + 2 > view.byteLength) return 1;
  const count = view.getUint16(directory, little);
  for (let entry = directory + 2; entry < directory + 2 + 12 * count; entry += 12) {
    if (entry + 12 > view.byteLength) return 1;
    if (view.getUint16(entry, little) === ORIENTATION_TAG) return view.getUint16(entry + 8, little);
  }
  return 1;
}
