// Painting a mask over a picture. What is painted is sent as transparent, OpenAI's way.

const $ = (id) => document.getElementById(id);
const image = $("edit-image");
const canvas = $("edit-mask");
const paper = $("paper");
let file = null; // the picture as it was opened or drawn
let painted = false;
let at = [0.5, 0.5]; // the brush, in parts of the picture
let last = null;

const pen = () => canvas.getContext("2d");
const radius = () => (Number($("brush-size").value) / 100) * canvas.width / 2;

export function clear() {
  pen().clearRect(0, 0, canvas.width, canvas.height);
  painted = false;
}

export async function open(blob) {
  file = blob;
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  await image.decode();
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  image.className = "checkered";
  clear();
}

export const isOpen = () => file !== null;

// The files of the request: the picture, and the mask unless nothing is painted.
export async function files() {
  if (!painted) return { image: file, mask: null };
  const mask = new OffscreenCanvas(canvas.width, canvas.height);
  const out = mask.getContext("2d");
  out.fillRect(0, 0, mask.width, mask.height);
  // The brush's soft edge would be neither kept nor changed: paint counts where it is seen.
  const paint = pen().getImageData(0, 0, canvas.width, canvas.height);
  const whole = out.getImageData(0, 0, mask.width, mask.height);
  for (let i = 3; i < whole.data.length; i += 4) whole.data[i] = paint.data[i] > 127 ? 0 : 255;
  out.putImageData(whole, 0, 0);
  return { image: file, mask: await mask.convertToBlob({ type: "image/png" }) };
}

function stroke(from, to, erase = false) {
  const p = pen();
  p.globalCompositeOperation = erase ? "destination-out" : "source-over";
  p.strokeStyle = "#e5484d";
  p.lineWidth = 2 * radius();
  p.lineCap = "round";
  p.beginPath();
  p.moveTo(from[0] * canvas.width, from[1] * canvas.height);
  p.lineTo(to[0] * canvas.width + 0.01, to[1] * canvas.height);
  p.stroke();
  painted ||= !erase;
}

function showBrush() {
  const size = `${2 * radius() * (paper.clientWidth / canvas.width)}px`;
  Object.assign($("brush").style, {
    left: `${at[0] * 100}%`, top: `${at[1] * 100}%`, width: size, height: size,
  });
  $("brush").hidden = false;
}

function place(event) {
  const box = paper.getBoundingClientRect();
  at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return at;
}

paper.addEventListener("pointerdown", (e) => {
  if (!file) return;
  paper.setPointerCapture(e.pointerId);
  last = place(e);
  stroke(last, last, e.button === 2);
  showBrush();
});
paper.addEventListener("pointermove", (e) => {
  const here = place(e);
  if (last) stroke(last, here, (e.buttons & 2) > 0);
  if (last) last = here;
  if (file) showBrush();
});
for (const end of ["pointerup", "pointercancel"]) {
  paper.addEventListener(end, () => { last = null; });
}
paper.addEventListener("pointerleave", () => { $("brush").hidden = true; });
paper.addEventListener("contextmenu", (e) => e.preventDefault());
paper.addEventListener("keydown", (e) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!file || !(e.key in moves || e.key === " " || e.key === "x")) return;
  e.preventDefault();
  const step = e.shiftKey ? 0.1 : 0.02;
  if (e.key in moves) {
    at = at.map((v, i) => Math.min(1, Math.max(0, v + step * moves[e.key][i])));
  } else {
    stroke(at, at, e.key === "x");
  }
  showBrush();
});
$("brush-size").addEventListener("input", () => file && showBrush());
$("clear-mask").addEventListener("click", clear);
