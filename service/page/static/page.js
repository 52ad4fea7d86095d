// The page: asks /api for what runs now and draws it. It changes nothing, and keeps nothing but what is on the screen.
"use strict";

const NOW_MS = 2000;      // as often as replicas say how they do
const LISTS_MS = 5000;    // models and sessions
const KEPT_MS = 300000;   // how far the charts reach back
const LEAST_MS = 60000;   // and at least so far, so that the first points do not jump
const MOST_REASONS = 6;   // lines in the chart of refusals; there are more colours than anybody can tell apart

const byId = (id) => document.getElementById(id);
const chosen = { tenant: "", model: "", modelsPage: "", sessionsPage: "" };
const history = [];
let about = null;
let timers = [];

// --- what is asked ---------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, query = {}) {
  const asked = new URLSearchParams(Object.entries({ ...query, tenant: chosen.tenant }).filter(([, value]) => value));
  return read(await fetch(`api/${path}?${asked}`));
}

function send(path, body) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return fetch(`api/${path}`, request).then(read);
}

async function read(answer) {
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, body.error ? body.error.message : `status ${answer.status}`);
  return body;
}

// --- how values read -------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

function number(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1000 ? whole.format(value) : short.format(value);
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value ? Math.min(units.length - 1, Math.floor(Math.log2(value) / 10)) : 0;
  return `${short.format(value / 1024 ** power)} ${units[power]}`;
}

function span(ms) {
  if (ms === null || ms === undefined) return "–";
  const seconds = Math.floor(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

function element(name, content = "", className = "") {
  const made = document.createElement(name);
  made.append(content);
  if (className) made.className = className;
  return made;
}

// --- tables ----------------------------------------------------------------------------------------

// A column: its heading, what to show of a row (text or an element), and "text", "id" or "number".
function fill(id, columns, rows, note, isChosen = () => false) {
  const head = element("tr");
  for (const [heading, , kind] of columns) head.append(element("th", heading, kind === "number" ? "number" : ""));
  const lines = rows.map((row) => {
    const line = element("tr", "", isChosen(row) ? "chosen" : "");
    for (const [, show, kind] of columns) {
      const cell = element("td", show(row), kind === "id" ? "text id" : kind);
      if (kind !== "number") cell.title = cell.textContent;
      line.append(cell);
    }
    return line;
  });
  if (!rows.length) {
    const cell = element("td", note, "note");
    cell.colSpan = columns.length;
    const line = element("tr");
    line.append(cell);
    lines.push(line);
  }
  byId(id).replaceChildren(head, ...lines);
}

function button(text, act, className = "") {
  const made = element("button", text, className);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function pages(id, page, next, turn) {
  const buttons = [];
  if (page) buttons.push(button("First page", () => turn("")));
  if (next) buttons.push(button("Next page", () => turn(next)));
  byId(id).replaceChildren(...buttons);
}

// --- charts ----------------------------------------------------------------------------------------

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

class Chart {
  // `series`: names of lines to what they show of a moment in history, or null where there is nothing.
  constructor(title, unit, series, empty) {
    Object.assign(this, { series, empty, plot: null, names: "" });
    const card = element("div", "", "card");
    const heading = element("h2", `${title} `);
    heading.append(element("small", unit));
    this.box = element("div", "", "plot");
    this.note = element("div", "", "empty");
    this.legend = element("div");
    card.append(heading, this.box, this.legend);
    byId("charts").append(card);
    new ResizeObserver(() => this.plot && this.plot.setSize(this.size())).observe(this.box);
  }

  size() {
    return { width: this.box.clientWidth, height: this.box.clientHeight };
  }

  draw() {
    const series = this.series();
    const names = Object.keys(series).join("\n");
    const seconds = history.map((moment) => moment.time_ms / 1000);
    const lines = Object.values(series).map((show) => history.map(show));
    const isEmpty = !lines.some((line) => line.some((value) => value !== null && value !== undefined));
    if (!this.plot || names !== this.names) this.make(Object.keys(series), names);
    this.plot.setData([seconds, ...lines]);
    if (this.plot.cursor.idx === null || this.plot.cursor.idx === undefined || this.plot.cursor.left < 0) {
      this.plot.setLegend({ idx: seconds.length - 1 });
    }
    this.note.textContent = isEmpty ? this.empty : "";
    this.note.hidden = !isEmpty;
  }

  make(lines, names) {
    this.forget();
    this.names = names;
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      ...this.size(),
      series: [
        { label: "Time", value: (_, at) => (at === null || at === undefined ? "–" : clock(at)) },
        ...lines.map((label, index) => {
          const stroke = colour(`--c${(index % 6) + 1}`);
          const fill = lines.length === 1 ? `${stroke}22` : undefined;
          return { label, stroke, fill, width: 2, points: { show: false }, value: (_, shown) => number(shown) };
        }),
      ],
      axes: [
        { ...axis, space: 80, size: 28, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 52, values: (_, ticks) => ticks.map(number) },
      ],
      scales: {
        x: { time: true, range: (_, from, to) => reach(from, to) },
        y: { range: (_, from, to) => [0, to > 0 ? to * 1.15 : 1] },
      },
      cursor: { drag: { x: false, y: false }, points: { size: 7 } },
      legend: { mount: (_, legend) => this.legend.replaceChildren(legend) },
    };
    this.plot = new uPlot(options, [[], ...lines.map(() => [])], this.box);
    this.box.append(this.note);
  }

  forget() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }
}

function reach(from, to) {
  if (from === null || to === null) return [Date.now() / 1000 - LEAST_MS / 1000, Date.now() / 1000];
  return [Math.min(from, to - LEAST_MS / 1000), to];
}

function reasons() {
  const sums = {};
  for (const { figures } of history) {
    for (const [reason, rate] of Object.entries(figures.refusals_per_s)) sums[reason] = (sums[reason] || 0) + rate;
  }
  const names = Object.keys(sums).sort((a, b) => sums[b] - sums[a] || a.localeCompare(b));
  const shown = names.slice(0, names.length > MOST_REASONS ? MOST_REASONS - 1 : MOST_REASONS).sort();
  const lines = {};
  for (const name of shown) lines[name] = ({ figures }) => figures.refusals_per_s[name] || 0;
  if (shown.length < names.length) {
    const others = names.filter((name) => !shown.includes(name));
    lines.others = ({ figures }) => others.reduce((sum, name) => sum + (figures.refusals_per_s[name] || 0), 0);
  }
  return lines;
}

let charts = [];

function makeCharts() {
  charts = [
    new Chart("Chunks", "applied a second", () => ({ "all replicas": ({ figures }) => figures.chunks_per_s }), "waiting for the first figures"),
    new Chart("Forward", "ms from request to answer", () => ({
      p50: ({ figures }) => figures.duration_ms.forward.p50,
      p90: ({ figures }) => figures.duration_ms.forward.p90,
      p99: ({ figures }) => figures.duration_ms.forward.p99,
    }), "no Forward since the page was opened"),
    new Chart("Batches", "chunks computed together", () => ({
      mean: ({ figures }) => figures.batch_chunks.mean,
      p99: ({ figures }) => figures.batch_chunks.p99,
    }), "no batch since the page was opened"),
    new Chart("Refusals", "a second, by reason", reasons, "nothing was refused since the page was opened"),
  ];
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of charts) chart.forget();
  if (history.length) charts.forEach((chart) => chart.draw());
});

// --- what is shown ---------------------------------------------------------------------------------

function tile(name, value, unit = "", more = "") {
  const card = element("div", "", "card tile");
  const shown = element("div", value, "value");
  if (unit) shown.append(" ", element("small", unit));
  card.append(element("div", name, "name"), shown, element("div", more, "more"));
  return card;
}

function showNow(now) {
  about = now;
  const { figures, replicas } = now;
  byId("who").textContent = now.needs_login ? `${now.login} · ${now.tenant}` : `tenant ${now.tenant}`;
  byId("logout").hidden = !now.needs_login;
  byId("choice").hidden = now.tenants.length < 2;
  byId("models-of").textContent = `of tenant ${now.tenant}`;
  const options = now.tenants.map((tenant) => new Option(tenant, tenant, false, tenant === now.tenant));
  const shown = [...byId("tenant").options].map((option) => option.value);
  if (shown.join("\n") !== now.tenants.join("\n")) byId("tenant").replaceChildren(...options);
  const own = tile("Sessions", whole.format(now.sessions), "", `of tenant ${now.tenant}`);
  byId("no-figures").hidden = figures !== null;
  byId("charts").hidden = byId("server").hidden = figures === null;
  if (figures === null) {
    byId("tiles").replaceChildren(own);
    return;
  }
  const serving = replicas.filter((replica) => replica.is_serving).length;
  const { forward } = figures.duration_ms;
  const refused = Object.values(figures.refusals_per_s).reduce((sum, rate) => sum + rate, 0);
  byId("tiles").replaceChildren(
    tile("Replicas", whole.format(replicas.length), "", serving === replicas.length ? "all serving" : `${serving} serving`),
    tile("Sessions", whole.format(now.sessions), "", figures.sessions > now.sessions ? `${whole.format(figures.sessions)} of all tenants` : `of tenant ${now.tenant}`),
    tile("Chunks", number(figures.chunks_per_s), "/s", figures.replayed_per_s ? `${number(figures.replayed_per_s)} /s replayed` : "none replayed"),
    tile("Forward p50", number(forward.p50), forward.p50 === null ? "" : "ms", `p99 ${number(forward.p99)}${forward.p99 === null ? "" : " ms"}`),
    tile("Steps", number(figures.steps_per_s), "/s", "optimizer, all models"),
    tile("Refusals", number(refused), "/s", `${number(figures.operations_per_s)} operations/s`),
    tile("Memory", bytes(figures.memory_bytes), "", `${number(figures.cpu_cores)} cores busy`),
  );
  history.push({ time_ms: now.time_ms, figures });
  while (history.length && history[0].time_ms < now.time_ms - KEPT_MS) history.shift();
  if (!charts.length) makeCharts();
  charts.forEach((chart) => chart.draw());
  showServer(now);
}

function showServer({ figures, replicas, time_ms: nowMs }) {
  const known = (show) => (replica) => (replica.is_known ? show(replica) : "–");
  fill("replicas", [
    ["Replica", (replica) => replica.replica_id, "id"],
    ["State", (replica) => stateOf(replica), "text"],
    ["Host", known((replica) => `${replica.host}${replica.worker ? ` · worker ${replica.worker}` : ""}`), "text"],
    ["Version", known((replica) => replica.version), "text"],
    ["Up", known((replica) => span(nowMs - replica.start_time_ms)), "number"],
    ["Chunks/s", (replica) => number(replica.chunks_per_s), "number"],
    ["In work", (replica) => number(replica.operations_in_flight), "number"],
    ["Memory", (replica) => bytes(replica.memory_bytes), "number"],
  ], replicas, "No replica has said in the last ten seconds that it runs: the store may just have been restarted.");
  const names = { forward: "Forward", backward: "Backward", update: "Update", store: "Store round trip" };
  fill("durations", [
    ["", ([kind]) => names[kind] || kind, "text"],
    ["a second", ([, one]) => number(one.per_s), "number"],
    ["p50", ([, one]) => number(one.p50), "number"],
    ["p90", ([, one]) => number(one.p90), "number"],
    ["p99", ([, one]) => number(one.p99), "number"],
  ], Object.entries(figures.duration_ms), "nothing yet");
}

function stateOf(replica) {
  if (!replica.is_known) return element("span", "another release", "pill");
  if (!replica.is_serving) return element("span", "not serving", "pill bad");
  return element("span", replica.age_ms > 2 * NOW_MS ? `silent for ${span(replica.age_ms)}` : "serving", replica.age_ms > 2 * NOW_MS ? "pill bad" : "pill good");
}

function showModels({ models, next_page_token: next }) {
  const nowMs = about ? about.time_ms : Date.now();
  fill("models", [
    ["Model", (model) => button(model.model_id, () => choose({ model: model.model_id, sessionsPage: "" }), "link"), "text"],
    ["Version", (model) => whole.format(model.version), "number"],
    ["Steps/s", (model) => number(model.steps_per_s), "number"],
    ["Gradient norm", (model) => number(model.gradient_norm), "number"],
    ["Last step", (model) => (model.last_step_ms ? `${span(Math.max(0, nowMs - model.last_step_ms))} ago` : "–"), "number"],
    ["Waiting", (model) => whole.format(model.waiting_contributions), "number"],
    ["D → H", (model) => `${model.input_size} → ${model.state_size}`, "number"],
  ], models, "This tenant has no models yet: timernn models create makes one.", (model) => model.model_id === chosen.model);
  pages("models-pages", chosen.modelsPage, next, (page) => choose({ modelsPage: page }));
}

function showSessions({ sessions, next_page_token: next }) {
  const title = element("span", chosen.model ? `Sessions of ${chosen.model} ` : "Sessions ");
  if (chosen.model) title.append(button("show all", () => choose({ model: "", sessionsPage: "" }), "link"));
  else title.append(element("small", "the next to expire first"));
  byId("sessions-title").replaceChildren(title);
  fill("sessions", [
    ["Session", (session) => session.session_id, "id"],
    ["Model", (session) => session.model_id, "text"],
    ["Chunks", (session) => whole.format(session.chunks), "number"],
    ["Age", (session) => span(session.age_ms), "number"],
    ["Last used", (session) => `${span(session.idle_ms)} ago`, "number"],
    ["Expires in", (session) => span(session.expires_in_ms), "number"],
    ["Version", (session) => (session.version ? whole.format(session.version) : "–"), "number"],
  ], sessions, next ? "None of this model among the sessions of this page; see the next one." : "No session is open here.");
  pages("sessions-pages", chosen.sessionsPage, next, (page) => choose({ sessionsPage: page }));
}

// --- when ------------------------------------------------------------------------------------------

async function refresh(task) {
  try {
    await task();
    byId("trouble").hidden = true;
    state("live", "good");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return showLogin();
    state("no answer", "bad");
    byId("trouble").hidden = false;
    byId("trouble").textContent = error instanceof Refused ? `The server answers: ${error.message}` : "The server does not answer; what is shown is old.";
  }
}

function state(text, kind) {
  byId("state").textContent = text;
  byId("state").className = `pill ${kind}`;
}

const now = () => refresh(async () => showNow(await ask("now")));
const lists = () => refresh(async () => {
  const [models, sessions] = await Promise.all([
    ask("models", { page_token: chosen.modelsPage }),
    ask("sessions", { model: chosen.model, page_token: chosen.sessionsPage }),
  ]);
  showModels(models);
  showSessions(sessions);
});

function choose(change) {
  Object.assign(chosen, change);
  lists();
}

function whileSeen(task) {
  return () => document.hidden || task();
}

async function start() {
  timers.forEach(clearInterval);
  timers = [];
  let first;
  try {
    first = await ask("now");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return showLogin();
  }
  byId("login").hidden = true;
  byId("dashboard").hidden = false;
  timers = [setInterval(whileSeen(now), NOW_MS), setInterval(whileSeen(lists), LISTS_MS)];
  if (first) showNow(first);
  else await now();
  await lists();
}

function showLogin() {
  timers.forEach(clearInterval);
  timers = [];
  history.length = 0;
  Object.assign(chosen, { tenant: "", model: "", modelsPage: "", sessionsPage: "" });
  byId("dashboard").hidden = byId("choice").hidden = byId("logout").hidden = true;
  byId("who").textContent = "";
  byId("login").hidden = false;
  state("logged out", "");
  byId("token").focus();
}

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("login-error").textContent = "";
  try {
    await send("login", { token: byId("token").value });
  } catch (error) {
    byId("login-error").textContent = error instanceof Refused ? error.message : "The server does not answer.";
    return;
  }
  byId("token").value = "";
  start();
});

byId("logout").addEventListener("click", async () => {
  await send("logout", {}).catch(() => undefined);
  showLogin();
});

byId("tenant").addEventListener("change", () => {
  Object.assign(chosen, { tenant: byId("tenant").value, model: "", modelsPage: "", sessionsPage: "" });
  now();
  lists();
});

start();
