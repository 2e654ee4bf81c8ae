"use strict";
// One array at a time: its parts (left to right and top to bottom the two dimensions that are split most) and the devices, by colour.
const AXES = Object.keys(DATA.mesh), DEVICES = AXES.reduce((n, a) => n * DATA.mesh[a], 1);
const byId = (id) => document.getElementById(id);
const parts = (axes) => axes.reduce((n, a) => n * DATA.mesh[a], 1);
let chosen = 0, device = DATA.device, grid = [], rows = 1, columns = 1, across = 1;

function place(number) {
  const at = {};
  for (const axis of [...AXES].reverse()) { at[axis] = number % DATA.mesh[axis]; number = Math.floor(number / DATA.mesh[axis]); }
  return at;
}
function slot(number) {
  const at = place(number);
  return DATA.arrays[chosen].dims.map((axes) => axes.reduce((i, a) => i * DATA.mesh[a] + at[a], 0));
}
function range(dim, index) {
  const array = DATA.arrays[chosen], step = Math.ceil(array.shape[dim] / parts(array.dims[dim]));
  return `${array.axes[dim]} ${Math.min(index * step, array.shape[dim])}:${Math.min((index + 1) * step, array.shape[dim])}`;
}
function colour(where) {
  const counts = DATA.arrays[chosen].dims.map(parts), [row, column] = grid;
  const c = column === undefined ? 0 : where[column], r = row === undefined ? 0 : where[row];
  let hue = columns > 1 ? c / columns : r / rows, light = columns > 1 ? 60 + 24 * r / Math.max(rows - 1, 1) : 68;
  where.forEach((index, dim) => { if (!grid.includes(dim) && counts[dim] > 1) light -= 18 * index / counts[dim]; });
  return `hsl(${200 + 305 * hue} 55% ${light}%)`;
}
function ready(canvas, height) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px"; canvas.width = width * scale; canvas.height = height * scale;
  const pen = canvas.getContext("2d"); pen.scale(scale, scale); pen.font = "11px system-ui, sans-serif"; pen.textAlign = "center"; pen.textBaseline = "middle";
  return [pen, width];
}
function cell(pen, x, y, w, h, fill, text, mark) {
  const gap = w > 6 && h > 6 ? 1 : 0;
  pen.fillStyle = fill; pen.fillRect(x, y, w - gap, h - gap);
  if (text !== "" && w > 9 + 7 * String(text).length && h > 13) { pen.fillStyle = "#111"; pen.fillText(text, x + w / 2, y + h / 2); }
  if (mark) { pen.strokeStyle = "#000"; pen.lineWidth = 2; pen.strokeRect(x + 1, y + 1, w - 2 - gap, h - 2 - gap); }
}
function first(where) {
  const at = {};
  DATA.arrays[chosen].dims.forEach((axes, dim) => { let left = where[dim]; for (const a of [...axes].reverse()) { at[a] = left % DATA.mesh[a]; left = Math.floor(left / DATA.mesh[a]); } });
  return AXES.reduce((n, a) => n * DATA.mesh[a] + (at[a] || 0), 0);
}
function cellSlot(row, column) {
  const where = slot(device);
  if (grid[0] !== undefined) where[grid[0]] = row;
  if (grid[1] !== undefined) where[grid[1]] = column;
  return where;
}
function draw() {
  const array = DATA.arrays[chosen], counts = array.dims.map(parts);
  grid = counts.map((n, dim) => [n, dim]).filter(([n]) => n > 1).sort((a, b) => b[0] - a[0]).slice(0, 2).map(([, dim]) => dim).sort((a, b) => a - b);
  rows = grid[0] === undefined ? 1 : counts[grid[0]]; columns = grid[1] === undefined ? 1 : counts[grid[1]];
  byId("what").textContent = array.path;
  const total = counts.reduce((n, c) => n * c, 1);
  const beside = counts.map((n, dim) => [n, dim]).filter(([n, dim]) => n > 1 && !grid.includes(dim)).map(([, dim]) => array.axes[dim]);
  byId("about").textContent = `${array.shape.join(" x ")} (${array.axes.join(", ")}), at rest ${array.notation}: ${total.toLocaleString()} part${total > 1 ? "s" : ""}, each on ${array.copies.toLocaleString()} device${array.copies > 1 ? "s" : ""}.` +
    (grid.length ? ` Down: ${array.axes[grid[0]]}.` : "") + (grid.length > 1 ? ` Across: ${array.axes[grid[1]]}.` : "") + (beside.length ? ` Shown: the device's own slice of ${beside.join(", ")}.` : "");
  const mine = slot(device).join();
  const tall = Math.max(2, Math.min(34, 300 / rows)), [pen, width] = ready(byId("array"), Math.max(34, rows * tall));
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    const where = cellSlot(r, c);
    cell(pen, c * width / columns, r * tall, width / columns, rows === 1 ? 34 : tall, colour(where), first(where), where.join() === mine);
  }
  const active = AXES.filter((a) => DATA.mesh[a] > 1);
  across = 1;
  for (const a of [...active].reverse()) { if (across * DATA.mesh[a] > 128 || across >= 16) break; across *= DATA.mesh[a]; }
  const lines = Math.ceil(DEVICES / across), high = Math.max(3, Math.min(30, 480 / lines)), [brush, room] = ready(byId("mesh"), lines * high);
  for (let d = 0; d < DEVICES; d++) cell(brush, (d % across) * room / across, Math.floor(d / across) * high, room / across, high, colour(slot(d)), d, d === device);
  document.querySelectorAll("button[data-array]").forEach((b) => b.setAttribute("aria-pressed", String(Number(b.dataset.array) === chosen)));
  tell(device);
}
function tell(d) {
  const array = DATA.arrays[chosen], at = place(d), where = slot(d);
  const lies = AXES.filter((a) => DATA.mesh[a] > 1).map((a) => `${a}=${at[a]}`).join(", ") || "the only one";
  const held = array.dims.map((axes, dim) => [axes, dim]).filter(([axes]) => parts(axes) > 1).map(([, dim]) => range(dim, where[dim])).join(", ") || "everything";
  byId("readout").textContent = `Device ${d} (${lies}) holds ${held}` + (array.copies > 1 ? `, as ${array.copies - 1} other${array.copies > 2 ? "s" : ""}.` : ", alone.");
}
function listen(canvas, find) {
  const at = (event) => { const box = canvas.getBoundingClientRect(); return find((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height); };
  canvas.addEventListener("pointermove", (event) => tell(at(event)));
  canvas.addEventListener("click", (event) => { device = at(event); draw(); });
}
const clip = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x * n)));
listen(byId("array"), (x, y) => first(cellSlot(clip(y, rows), clip(x, columns))));
listen(byId("mesh"), (x, y) => Math.min(DEVICES - 1, clip(y, Math.ceil(DEVICES / across)) * across + clip(x, across)));
document.querySelectorAll("button[data-array]").forEach((b) => b.addEventListener("click", () => { chosen = Number(b.dataset.array); draw(); byId("picture").scrollIntoView({ block: "nearest" }); }));
window.addEventListener("resize", draw);
// A link may name what to show: #array=3&device=17
const asked = new URLSearchParams(location.hash.slice(1));
if (asked.has("array")) chosen = Math.min(DATA.arrays.length - 1, Number(asked.get("array")) || 0);
else chosen = Math.max(0, DATA.arrays.findIndex((a) => a.dims.filter((axes) => parts(axes) > 1).length > 1));
if (asked.has("device")) device = Math.min(DEVICES - 1, Number(asked.get("device")) || 0);
draw();
