// Draws the charts at the page's width and ties the layer profile to the table of features.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const select = document.getElementById("layer");
  const more = document.getElementById("more");
  const FEW = 10;
  const AXES = 64; // pixels that axes and padding take beside the plotting area
  let picked = data.picked;
  const drawn = {};

  function fitted(spec, width) {
    const inner = Math.max(200, Math.min(width - AXES, 960));
    const copy = { ...spec };
    if (copy.vconcat) copy.vconcat = copy.vconcat.map((part) => ({ ...part, width: inner }));
    else copy.width = inner;
    return copy;
  }

  async function draw(name) {
    const place = document.getElementById(name);
    const chosen = place.querySelector("select")?.value; // of a chart's own list
    drawn[name]?.finalize();
    drawn[name] = await vegaEmbed(place, fitted(data.charts[name], place.clientWidth), {
      actions: false,
      ast: true, // the page's policy forbids code made of strings
      renderer: "svg",
    });
    const { view } = drawn[name];
    if (chosen) await view.signal("shown", chosen).runAsync();
    if (name !== "profile") return;
    view.addEventListener("click", (event, item) => {
      if (item && item.datum && item.datum.layer !== undefined) pick(item.datum.layer);
    });
    await view.signal("picked", picked).runAsync();
  }

  function cell(kind, text) {
    const made = document.createElement(kind);
    if (kind === "th") made.scope = "row";
    made.textContent = text;
    return made;
  }

  function pick(layer) {
    picked = layer;
    select.value = String(layer);
    const features = data.features[layer];
    const rows = features.map((values, i) => {
      const row = document.createElement("tr");
      row.hidden = i >= FEW;
      row.append(...values.map((value, j) => cell(j ? "td" : "th", value)));
      return row;
    });
    document.querySelector("#features tbody").replaceChildren(...rows);
    for (const part of document.querySelectorAll("[data-layer]")) part.hidden = part.dataset.layer !== String(layer);
    document.getElementById("count").textContent = `${features.length} features that lean to the target`;
    more.hidden = features.length <= FEW;
    more.textContent = `Show all ${features.length}`;
    drawn.profile?.view.signal("picked", layer).runAsync();
  }

  function drawAll() {
    return Promise.all(Object.keys(data.charts).map(draw));
  }

  select.addEventListener("change", () => pick(Number(select.value)));
  more.addEventListener("click", () => {
    for (const row of document.querySelectorAll("#features tbody tr")) row.hidden = false;
    more.hidden = true;
  });
  let width = window.innerWidth;
  let pending = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(pending);
    pending = setTimeout(drawAll, 150);
  });
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", ""));
})();
