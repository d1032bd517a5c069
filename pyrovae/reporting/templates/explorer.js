"use strict";
// The explorer of a report. It reads its numbers from an inert block of JSON, writes text alone,
// and draws on canvases; sliders and the map set the same two numbers, a cell of the sheet and a datum.
(() => {
  const given = JSON.parse(document.getElementById("explorer-data").textContent);
  const at = name => document.getElementById("explorer-" + name);
  const map = at("map"), place = at("place"), said = at("said"), datum = at("datum");
  const sliders = [at("axis0"), at("axis1")], cursor = at("cursor"), chosen = at("chosen");
  const { side, points, ends, columns } = given;
  const sheets = {};

  const ink = () => getComputedStyle(map).color;
  const valueAt = (axis, cell) =>
    ends[axis][0] + (ends[axis][1] - ends[axis][0]) * cell / (side - 1);

  function drawPicture(canvas, sheet, column, row) {
    const [height, width] = given.tile, pen = canvas.getContext("2d");
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    pen.drawImage(sheets[sheet], column * width, row * height, width, height, 0, 0, width, height);
  }

  // A line for each number: its name, and a dot between the least and the most of the data.
  function drawNumbers(canvas, values) {
    const pen = canvas.getContext("2d"), line = 22, [low, high] = given.spread;
    canvas.width = 320;
    canvas.height = line * values.length;
    pen.font = "14px system-ui, sans-serif";
    pen.fillStyle = pen.strokeStyle = ink();
    values.forEach((value, i) => {
      const y = line * (i + 0.5), range = high[i] - low[i] || 1;
      const x = 130 + 110 * Math.min(1, Math.max(0, (value - low[i]) / range));
      pen.fillText(columns[i], 0, y + 5, 120);
      pen.globalAlpha = 0.3;
      pen.fillRect(130, y - 0.5, 110, 1);
      pen.globalAlpha = 1;
      if (value === null) return;  // missing
      pen.beginPath();
      pen.arc(x, y, 4, 0, 7);
      pen.fill();
      pen.fillText(String(Number(value.toPrecision(3))), 250, y + 5, 68);
    });
  }

  const draw = (canvas, sheet, column, row, perRow) => given.tile
    ? drawPicture(canvas, sheet, column, row)
    : drawNumbers(canvas, given[sheet][row * perRow + column]);

  function showPlace() {
    const cells = sliders.map(slider => Number(slider.value));
    draw(at("decoded"), "sheet", cells[0], cells[1], side);
    const values = cells.map((cell, axis) => valueAt(axis, cell).toFixed(2));
    place.textContent = given.axes.map((name, axis) => name.split(" (")[0] + " = " + values[axis]).join(", ");
    sliders.forEach((slider, axis) => slider.setAttribute("aria-valuetext", values[axis]));
    const [x, y] = [1000 * cells[0] / (side - 1), 1000 - 1000 * cells[1] / (side - 1)];
    cursor.setAttribute("transform", `translate(${x} ${y})`);
  }

  function showDatum() {
    const i = Number(datum.value), [x, y] = points[i];
    document.querySelectorAll("canvas[data-part]").forEach((canvas, part, all) =>
      draw(canvas, "events", part, i, all.length));
    said.textContent = given.said[i];
    datum.setAttribute("aria-valuetext", given.said[i]);
    chosen.setAttribute("transform", `translate(${x} ${y})`);
  }

  // Where a pointer is, in thousandths of the map.
  function position(event) {
    const box = map.getBoundingClientRect(), [x0, y0, size] = [-30, -30, 1060];
    return [x0 + size * (event.clientX - box.left) / box.width,
            y0 + size * (event.clientY - box.top) / box.height];
  }

  function move(event) {
    const [x, y] = position(event);
    [x, 1000 - y].forEach((value, axis) => {
      sliders[axis].value = Math.round(value / 1000 * (side - 1));
    });
    showPlace();
  }

  function choose(event) {
    const [x, y] = position(event), far = ([u, v]) => (u - x) ** 2 + (v - y) ** 2;
    datum.value = points.reduce((best, point, i) => far(point) < far(points[best]) ? i : best, 0);
    showDatum();
  }

  function start() {
    sliders.forEach(slider => slider.addEventListener("input", showPlace));
    datum.addEventListener("input", showDatum);
    map.addEventListener("pointermove", move);
    map.addEventListener("pointerdown", move);
    map.addEventListener("click", choose);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      showPlace();
      showDatum();
    });
    showPlace();
    showDatum();
    at("controls").hidden = false;
  }

  const load = name => new Promise((resolve, reject) => {
    const image = sheets[name] = new Image();
    image.onload = resolve;
    image.onerror = reject;
    image.src = "data:image/png;base64," + given[name];
  });
  Promise.all(given.tile ? ["sheet", "events"].map(load) : []).then(start);
})();
