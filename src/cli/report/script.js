"use strict";
// The values under the pointer, read back from the paths that are drawn: nothing stands twice in the page.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
const shown = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2));
for (const chart of document.querySelectorAll(".chart")) {
  const [left, top, width, height] = chart.dataset.area.split(" ").map(Number);
  const [x0, x1, y0, y1] = chart.dataset.range.split(" ").map(Number);
  const percent = "percent" in chart.dataset;
  const rule = chart.querySelector(".rule");
  let curves = null;
  const points = (path) => path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number));
  const hide = () => {
    tip.hidden = true;
    rule.style.visibility = "hidden";
  };
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("pointermove", (event) => {
    curves ??= [...chart.querySelectorAll(".curve")].map((path) => ({ path, points: points(path) }));
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    if (at < left - 4 || at > left + width + 4 || curves.length === 0) return hide();
    const near = curves.map(({ path, points }) => {
      const point = points.reduce((best, one) => (Math.abs(one[0] - at) < Math.abs(best[0] - at) ? one : best));
      return { path, point };
    });
    const y = ((event.clientY - box.top) / box.height) * chart.viewBox.baseVal.height;
    near.sort((one, other) => Math.abs(one.point[1] - y) - Math.abs(other.point[1] - y));
    const listed = near.slice(0, 8).sort((one, other) => one.point[1] - other.point[1]);
    const place = near[0].point[0];
    rule.setAttribute("x1", place);
    rule.setAttribute("x2", place);
    rule.style.visibility = "visible";
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `${chart.dataset.x} ${shown(x0 + ((place - left) / width) * (x1 - x0))}`;
    tip.append(head);
    for (const { path, point } of listed) {
      const value = y1 - ((point[1] - top) / height) * (y1 - y0);
      const line = document.createElement("div");
      line.textContent = `${path.dataset.label || "all runs"}: ${percent ? `${(100 * value).toFixed(1)} %` : shown(value)}`;
      line.style.color = getComputedStyle(path).stroke;
      tip.append(line);
    }
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
  });
}
// An arm in a legend picks its curves out of the others.
for (const item of document.querySelectorAll(".legend li[data-label]")) {
  const dim = (on) => {
    for (const path of item.closest("section").querySelectorAll(".curve")) {
      path.classList.toggle("dim", on && path.dataset.label !== item.dataset.label);
    }
  };
  item.addEventListener("pointerenter", () => dim(true));
  item.addEventListener("pointerleave", () => dim(false));
}
