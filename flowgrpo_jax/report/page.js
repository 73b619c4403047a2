// The page of a run: draws the curves with uPlot, and moves the pictures through training.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { axis: "iteration", smooth: 8, ...stored() };
  const axisNames = { iteration: "iteration", hours: "hours", images: "images sampled" };
  const plots = [];

  function stored() {
    try { return JSON.parse(sessionStorage.getItem("page") || "{}"); } catch { return {}; }
  }
  function keep() {
    try { sessionStorage.setItem("page", JSON.stringify(state)); } catch { /* a file page */ }
  }
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // -- numbers ---------------------------------------------------------------------------
  function text(value, unit) {
    if (value == null) return "–";
    if (unit === "%") return (100 * value).toFixed(1) + "%";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e-3 && size < 1e5) {
      return size < 100 ? String(Number(value.toPrecision(3))) :
        Math.round(value).toLocaleString("en");
    }
    return value.toExponential(1).replace("e+", "e");
  }
  // Ticks that differ have labels that differ: as many digits as their distance needs.
  function ticks(values, unit) {
    const scale = unit === "%" ? 100 : 1;
    const step = values.length > 1 ? Math.abs(values[1] - values[0]) * scale : 1;
    let digits = 0;
    while (digits < 9 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-3) {
      digits += 1;
    }
    const large = Math.max(...values.map(Math.abs)) * scale >= 1e5;
    return values.map((value) => {
      const shown = value * scale;
      if (shown === 0) return "0" + (unit === "%" ? "%" : "");
      if (large || digits > 4 && Math.abs(shown) < 0.1) return shown.toExponential(1);
      return shown.toLocaleString("en", {
        minimumFractionDigits: digits, maximumFractionDigits: digits }) + (unit === "%" ? "%" : "");
    });
  }
  // Mean over a centred window of a share of the points; gaps stay gaps.
  function smoothed(values, percent) {
    const half = Math.round(values.length * percent / 200);
    if (!half) return values;
    const sums = [0], counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value == null ? 0 : 1));
    });
    return values.map((value, i) => {
      if (value == null) return null;
      const low = Math.max(0, i - half), high = Math.min(values.length, i + half + 1);
      return (sums[high] - sums[low]) / (counts[high] - counts[low]);
    });
  }

  // -- one chart -------------------------------------------------------------------------
  const colour = (line) => css(`--c${line.run % 8 + 1}`);
  const lineName = (line) => [data.runs.length > 1 ? data.runs[line.run] : "", line.label]
    .filter(Boolean).join(", ");
  const xs = (line) => data.axes[line.run][line.rows][state.axis];

  function drawn(chart) {
    const lines = chart.lines.filter(xs);
    const tables = [], series = [{}], bands = [];
    for (const line of lines) {
      const noisy = line.rows === "train" && chart.metric !== "trained_prompt_num";
      const values = noisy ? smoothed(line.mean, state.smooth) : line.mean;
      const table = [xs(line), values];
      const stroke = colour(line);
      const few = line.mean.length < 40;
      series.push({ stroke, width: 2, dash: line.dash, spanGaps: true,
        points: { show: !noisy && few || line.mean.length === 1, size: 6, fill: stroke } });
      if (line.low) {
        table.push(line.high, line.low);
        const faint = { stroke: stroke + "00", width: 1, spanGaps: true, points: { show: false } };
        series.push(faint, { ...faint });
        bands.push({ series: [series.length - 2, series.length - 1], fill: stroke + "2e" });
      } else if (noisy) {
        table.push(line.mean);
        series.push({ stroke: stroke + "55", width: 1, spanGaps: true, points: { show: false } });
      }
      tables.push(table);
    }
    return { lines, joined: tables.length ? uPlot.join(tables) : null, series, bands };
  }

  function legend(figure, chart, lines, at) {
    const box = figure.querySelector(".legend");
    box.replaceChildren(...lines.map((line) => {
      const key = document.createElement("span"), bar = document.createElement("i");
      const value = document.createElement("b");
      key.className = "key";
      bar.style.background = colour(line);
      if (line.dash.length) bar.className = "dashed";
      const name = lineName(line);
      value.textContent = at == null ? ends(chart, line) : under(chart, line, at);
      key.append(bar, name ? name + " " : "", value);
      return key;
    }));
  }
  function ends(chart, line) {
    const noisy = line.rows === "train";
    const values = (noisy ? smoothed(line.mean, state.smooth) : line.mean)
      .filter((value) => value != null);
    const first = text(values[0], chart.unit), last = text(values.at(-1), chart.unit);
    const unit = chart.unit && chart.unit !== "%" ? " " + chart.unit : "";
    return (values.length > 1 ? `${first} → ${last}` : first) + unit;
  }
  function under(chart, line, at) {
    const axis = xs(line);
    let low = 0, high = axis.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (axis[middle] < at) low = middle + 1; else high = middle;
    }
    if (low && Math.abs(axis[low - 1] - at) <= Math.abs(axis[low] - at)) low -= 1;
    const where = state.axis === "hours" ? text(axis[low]) :
      Math.round(axis[low]).toLocaleString("en");
    const range = line.low ?
      ` (${text(line.low[low], chart.unit)} to ${text(line.high[low], chart.unit)})` : "";
    return `${text(line.mean[low], chart.unit)}${range} at ${where}`;
  }

  function draw(figure, chart) {
    const { lines, joined, series, bands } = drawn(chart);
    const place = figure.querySelector(".plot");
    place.replaceChildren();
    legend(figure, chart, lines, null);
    if (!joined || figure.closest("details:not([open])")) return null;
    const axis = { stroke: css("--soft"), font: "11px sans-serif", labelFont: "11px sans-serif",
      labelSize: 18, labelGap: 0, gap: 4, grid: { stroke: css("--line"), width: 1 },
      ticks: { show: false } };
    const whole = state.axis === "iteration" ? { incrs: wholeSteps } : {};
    const unit = chart.unit === "%" ? "" : chart.unit;
    return new uPlot({
      width: place.clientWidth, height: 220, series, bands,
      legend: { show: false },
      padding: [8, 14, 0, 0],
      cursor: { sync: { key: "x" }, points: { size: 6 }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { range: range(chart) } },
      axes: [
        { ...axis, ...whole, size: 24, space: 40, label: axisNames[state.axis],
          values: (_, all) => ticks(all, "") },
        { ...axis, label: chart.title + (unit ? `, ${unit}` : ""), size: width,
          values: (_, all) => ticks(all, chart.unit) },
      ],
      hooks: { setCursor: [(plot) => {
        const inside = plot.cursor.left >= 0;
        legend(figure, chart, lines, inside ? plot.posToVal(plot.cursor.left, "x") : null);
      }] },
    }, joined, place);
  }
  const wholeSteps = [1, 2, 5].flatMap((_, i, all) => all.map((step) => step * 10 ** i))
    .concat([1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6]);
  // As wide as the longest label.
  const width = (_, labels) =>
    10 + 6.5 * Math.max(4, ...(labels || []).map((label) => label.length));
  function range(chart) {
    return (_, low, high) => {
      if (low == null) return [0, 1];
      // Rounding of 1 is no movement.
      const flat = high - low <= 1e-5 * Math.abs(high);
      const pad = flat ? Math.abs(high) * 0.1 || 1e-3 : 0.06 * (high - low);
      const top = chart.unit === "%" && high <= 1 ? Math.min(1.0001, high + pad) : high + pad;
      return [low >= 0 ? Math.max(0, low - pad) : low - pad, top];
    };
  }

  // -- the curves of the page ------------------------------------------------------------
  function figures() {
    for (const section of data.sections) {
      const box = document.createElement(section.folded ? "details" : "section");
      const head = document.createElement(section.folded ? "summary" : "h3");
      head.textContent = section.folded ?
        `${section.title} (${section.charts.length})` : section.title;
      const grid = document.createElement("div");
      grid.className = "charts";
      for (const chart of section.charts) {
        const figure = document.getElementById("figure").content.firstElementChild.cloneNode(true);
        figure.querySelector("h4").textContent = chart.title;
        figure.querySelector(".note").textContent = chart.note;
        const advice = [chart.healthy && `Good: ${chart.healthy}.`,
          chart.remedy && `Otherwise: ${chart.remedy}.`].filter(Boolean).join(" ");
        figure.querySelector(".advice").textContent = advice;
        figure.querySelector(".plot").setAttribute("aria-label",
          `${chart.title} over ${axisNames[state.axis]}`);
        grid.append(figure);
        plots.push({ figure, chart, plot: null });
      }
      box.append(head, grid);
      box.addEventListener("toggle", redraw);
      document.getElementById("curves").append(box);
    }
  }
  function redraw() {
    for (const one of plots) {
      one.plot?.destroy();
      one.plot = draw(one.figure, one.chart);
    }
  }
  function controls() {
    const axis = document.getElementById("axis"), smooth = document.getElementById("smooth");
    for (const option of [...axis.options]) {
      const known = data.axes.some((run) => Object.values(run).some((one) => one[option.value]));
      if (!known) option.remove();
    }
    axis.value = state.axis;
    if (!axis.value) { state.axis = "iteration"; axis.value = "iteration"; }
    smooth.value = state.smooth;
    const change = () => {
      state.axis = axis.value;
      state.smooth = Number(smooth.value);
      document.getElementById("window").textContent =
        state.smooth ? `mean over ${state.smooth}% of the run` : "off";
      keep();
      redraw();
    };
    axis.addEventListener("input", change);
    smooth.addEventListener("input", change);
    change();
  }

  // -- pictures through training -----------------------------------------------------------
  function sheets() {
    // With one evaluation there is nothing to slide through.
    const several = [...document.querySelectorAll(".through")]
      .filter((box) => box.querySelector("script"));
    several.forEach((box, number) => {
      const frames = JSON.parse(box.querySelector("script").textContent);
      const slider = box.querySelector("input"), shown = box.querySelector("output");
      const show = () => {
        const frame = frames[slider.value];
        shown.textContent = `iteration ${frame.iteration.toLocaleString("en")}`;
        box.querySelectorAll(".now").forEach((figure, place) => {
          figure.querySelector("img").src = frame.sources[place];
          figure.querySelector("figcaption").textContent = frame.captions[place];
        });
        state[`frame${number}`] = frames.length - 1 - slider.value;
        keep();
      };
      slider.max = frames.length - 1;
      slider.value = frames.length - 1 - (state[`frame${number}`] ?? 0);
      slider.addEventListener("input", show);
      show();
    });
  }

  // -- a page that is served is loaded again when the run has written more ---------------
  function follow() {
    const age = document.querySelector("time");
    if (age && document.body.dataset.finished !== "yes") {
      const minutes = (Date.now() - Date.parse(age.dateTime)) / 6e4;
      if (minutes >= 2) {
        const told = minutes < 120 ? `${Math.round(minutes)} min` : `${Math.round(minutes / 60)} h`;
        age.textContent += ` (${told} before this page was opened)`;
      }
    }
    const version = document.body.dataset.version;
    if (!location.protocol.startsWith("http") || !version) return;
    const timer = setInterval(async () => {
      try {
        const answer = await fetch("version");
        if (!answer.ok) clearInterval(timer);
        else if (await answer.text() !== version) location.reload();
      } catch { clearInterval(timer); }
    }, 5000);
  }

  figures();
  controls();
  sheets();
  follow();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let before = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== before) { before = innerWidth; redraw(); }
  });
  document.body.dataset.ready = "yes";
})();
