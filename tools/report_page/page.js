"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Map(); // element -> its figure

  // --- light and dark: the system's wish, until the button is pressed ---------------------------------------------
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let asked = null;
  const dress = () => {
    root.dataset.theme = asked ?? (system.matches ? "dark" : "light");
    root.style.colorScheme = root.dataset.theme;
    for (const [place, figure] of drawn) Plotly.react(place, dataOf(figure), layoutOf(figure), OPTIONS);
  };
  system.addEventListener("change", dress);
  document.getElementById("theme").addEventListener("click", () => {
    asked = root.dataset.theme === "dark" ? "light" : "dark";
    dress();
  });

  // --- figures: their data come from the record, their looks from the page ----------------------------------------
  const OPTIONS = { responsive: true, displaylogo: false, displayModeBar: false };
  const value = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const dataOf = (figure) => figure.data.map((trace) => trace.type !== "treemap" ? trace : {
    ...trace,
    marker: { ...trace.marker, colors: trace.marker.colors.map((c) => (c === "mixed" ? value("--track") : c)) },
  });
  const layoutOf = (figure) => {
    const axis = (own) => ({
      gridcolor: value("--grid"), linecolor: value("--line"), zeroline: false, automargin: false, fixedrange: true,
      exponentformat: "none", ...own, title: own?.title && { ...own.title, font: { size: 12, color: value("--soft") } },
    });
    const layout = figure.layout;
    return {
      ...layout,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: value("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: "#10151c", bordercolor: "#10151c", font: { color: "#eef1f5", size: 12.5 }, align: "left" },
      ...(layout.xaxis && { xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) }),
      ...(layout.annotations && {
        annotations: layout.annotations.map((a) => ({ ...a, font: { ...a.font, color: value("--soft") }, arrowcolor: value("--soft") })),
      }),
    };
  };
  const draw = () => {
    for (const place of all(".chart")) {
      if (drawn.has(place) || !place.offsetParent || !figures[place.id]) continue; // hidden ones wait until they are shown
      drawn.set(place, figures[place.id]);
      Plotly.newPlot(place, dataOf(figures[place.id]), layoutOf(figures[place.id]), OPTIONS);
    }
  };
  for (const details of all("details")) details.addEventListener("toggle", draw);

  // --- one named set of sizes at a time ----------------------------------------------------------------------------
  const pills = all("[data-pick]");
  const show = (shape) => {
    for (const pill of pills) pill.setAttribute("aria-pressed", String(pill.dataset.pick === shape));
    const here = (e) => !shape || e.dataset.shape === shape;
    for (const e of all("[data-shape]")) e.classList.toggle("off", !here(e));
    draw();
  };
  for (const pill of pills) pill.addEventListener("click", () => show(pill.dataset.pick));

  // --- what a bar says when it is pointed at -----------------------------------------------------------------------
  const tip = document.getElementById("tip");
  const say = (target, x, y) => {
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
  };
  document.addEventListener("pointermove", (e) => say(e.target.closest?.("[data-tip]"), e.clientX, e.clientY));
  document.addEventListener("focusin", (e) => {
    const target = e.target.closest("[data-tip]");
    const box = target?.getBoundingClientRect();
    say(target, box?.left ?? 0, box?.bottom ?? 0);
  });
  document.addEventListener("scroll", () => say(null), { passive: true });

  // --- tables that sort --------------------------------------------------------------------------------------------
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    if (typeof a === "string" || typeof b === "string") return String(a).localeCompare(String(b), undefined, { numeric: true });
    return a - b;
  };
  for (const head of all(".sortable th")) {
    const sort = () => {
      const table = head.closest("table");
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of all("th", table)) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, head.cellIndex), row]);
      const empty = (key) => Number(Number.isNaN(key)); // what has no figure stays at the end, whichever way
      rows.sort(([a], [b]) => empty(a) - empty(b) || down * compare(a, b) || 0);
      table.tBodies[0].append(...rows.map(([, row]) => row));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(); } });
  }

  // --- the command, and where one is on the page -------------------------------------------------------------------
  const copy = document.getElementById("copy");
  copy?.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(document.getElementById("command").textContent);
      copy.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(document.getElementById("command")); // a file's page may have no clipboard
      copy.textContent = "selected";
    }
  });
  const links = new Map(all("nav a").map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const a of links.values()) a.classList.remove("here");
      links.get(target.id)?.classList.add("here");
    }
  }, { rootMargin: "-80px 0px -70% 0px" });
  for (const section of all("main > section")) seen.observe(section);

  dress();
  show(pills.length ? pills[0].dataset.pick : "");
  root.dataset.ready = "yes";
})();
