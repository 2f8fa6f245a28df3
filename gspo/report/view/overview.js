// Curves of runs: a figure for each metric, a line for each run.

const CURVES = [
  ["reward/mean", "Reward"], ["eval/pass@1", "Held-out pass@1"], ["clip_ratio/tokens", "Clipped tokens, share"],
  ["routing/experts_changed", "Experts changed, share"], ["log_ratio/sequence_var", "Variance of log s"],
  ["entropy", "Entropy, nats"], ["completions/mean_length", "Length, tokens"], ["grad_norm", "Gradient norm"],
];

function drawOverview() {
  const known = [...new Set(page.runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  const shown = CURVES.filter(([metric]) => known.includes(metric));
  if (state.more) shown.unshift([state.more, state.more]);
  const rest = known.filter((metric) => !CURVES.some(([name]) => name === metric));
  if (!known.length) return [h("p", {}, "These runs have no metrics.jsonl.")];
  return [
    h("div", { class: "controls" },
      labelled("One more curve", choice("more", [["", "–"], ...rest.map((m) => [m, m])], state.more, (value) => {
        state.more = value;
        render();
      }))),
    h("div", { class: "legend" }, page.runs.map((run, i) => h("span", {},
      s("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, s("line", { class: `curve c${i % 4}`, x1: 0, x2: 26, y1: 5, y2: 5 })), run.name))),
    h("div", { class: "figures" }, shown.map(([metric, title]) => curveFigure(metric, title))),
    h("h2", {}, "Last values"),
    lastValues(shown),
  ];
}

function curveFigure(metric, title) {
  const curves = page.runs.map((run, i) => ({ run, i, at: run.metrics[metric] })).filter((curve) => curve.at);
  const [all, values] = [0, 1].map((k) => curves.flatMap((curve) => curve.at[k]));
  const { x, y, parts } = axes(all, values);
  const cursor = s("line", { class: "cursor", y1: FRAME.top, y2: FRAME.height - FRAME.bottom, visibility: "hidden" });
  const read = h("span", { class: "read" });
  const ends = curves.map(({ run, at }) => `${run.name} from ${number(at[1][0])} to ${number(at[1][at[1].length - 1])}`);
  const lines = curves.map(({ i, at: [steps, heights] }) => steps.length === 1
    ? s("circle", { class: `c${i % 4}`, cx: x(steps[0]), cy: y(heights[0]), r: 2.5, fill: "none" })
    : s("polyline", { class: `curve c${i % 4}`, points: steps.map((v, k) => `${x(v).toFixed(1)},${y(heights[k]).toFixed(1)}`).join(" ") }));
  const figure = drawing(`${title}: ${ends.join("; ")}. Left and right arrows read values.`, parts, lines, cursor);
  const steps = [...new Set(all)].sort((a, b) => a - b);
  let place = steps.length - 1;
  const show = (k) => {
    place = Math.min(Math.max(k, 0), steps.length - 1);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(steps[place]));
    cursor.setAttribute("x2", x(steps[place]));
    const found = curves.map(({ run, at }) => [run.name, at[1][at[0].indexOf(steps[place])]]);
    read.textContent = `${steps[place]}: ` + found.map(([name, value]) =>
      curves.length > 1 ? `${name} ${number(value)}` : number(value)).join(", ");
  };
  figure.setAttribute("tabindex", "0");
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); show(place + by); }
  });
  figure.addEventListener("pointermove", (event) => {
    const box = figure.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * FRAME.width;
    let nearest = 0;
    steps.forEach((v, k) => { if (Math.abs(x(v) - at) < Math.abs(x(steps[nearest]) - at)) nearest = k; });
    show(nearest);
  });
  return h("figure", {}, h("figcaption", {}, h("span", {}, title), read), figure);
}

function lastValues(shown) {
  const last = (run, metric) => (run.metrics[metric] ? run.metrics[metric][1].at(-1) : undefined);
  const columns = [{ name: "Run", text: true, show: (run) => run.name },
    ...shown.map(([metric, title]) => ({ name: title, show: (run) => number(last(run, metric)) }))];
  return table("The last line of each run's metrics", columns, page.runs);
}
