"use strict";
// Values under the pointer. Charts carry their data; nothing is fetched.
for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.dataset.chart);
  const cursor = chart.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  chart.parentElement.append(tip);
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * data.width;
    const share = (at - data.left) / (data.width - data.left - data.right);
    if (share < 0 || share > 1 || !data.lines.length) { hide(); return; }
    const wanted = data.x[0] + share * (data.x[1] - data.x[0]);
    const rows = [];
    let place = null;
    for (const line of data.lines) {
      if (!line.x.length) continue;
      let near = 0;
      line.x.forEach((x, i) => { if (Math.abs(x - wanted) < Math.abs(line.x[near] - wanted)) near = i; });
      place = place === null ? line.x[near] : place;
      rows.push([line.name, line.y[near] === null ? "–" : line.y[near]]);
    }
    if (place === null) return;
    tip.replaceChildren(...[["", place.toLocaleString()], ...rows].map(([name, value]) => {
      const row = document.createElement("div");
      row.textContent = name ? `${name}  ${value}` : value;
      return row;
    }));
    tip.hidden = false;
    const x = data.left + ((place - data.x[0]) / (data.x[1] - data.x[0] || 1)) * (data.width - data.left - data.right);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    const left = (x / data.width) * box.width;
    tip.style.left = `${left + tip.offsetWidth + 12 > box.width ? left - tip.offsetWidth - 8 : left + 8}px`;
  });
}
// Sheets of pictures over time.
for (const sheet of document.querySelectorAll(".sheets")) {
  const images = [...sheet.querySelectorAll("img")];
  const slider = sheet.querySelector("input");
  const label = sheet.querySelector("output");
  const button = sheet.querySelector("button");
  const show = (index) => {
    images.forEach((image, i) => image.classList.toggle("shown", i === index));
    slider.value = index;
    label.textContent = images[index].alt;
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) { stop(); return; }
    button.textContent = "Pause";
    timer = setInterval(() => show((Number(slider.value) + 1) % images.length), 600);
  });
  show(images.length - 1);
}
// Print what is folded away on the screen.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
