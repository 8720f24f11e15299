// The page of `ebr-engine serve`: sends files, shows the queue, compares. Names and errors are only ever set as text.

import { begin as beginViewer, chooser, close, compare, isEmpty, isShown } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const TRY = "try every task"; // in place of a task: a sheet to choose from
const OVER = ["done", "skipped", "failed", "cancelled"];
const rows = new Map(); // id of a job → what stands in the list for it
const sent = new Set(); // ids of jobs that this page has sent

async function call(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.status === 401 && path !== "/v1/session") {
    await login();
    return call(path, options);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    const error = new Error(told?.error?.message ?? `the server answered ${answer.status}`);
    error.again = answer.status === 429 ? Number(answer.headers.get("Retry-After")) || 5 : 0; // seconds
    throw error;
  }
  return answer.status === 204 ? null : answer.json();
}

let asking = null;
function login() {
  asking ??= new Promise((resolve) => {
    const dialog = $("login");
    dialog.showModal();
    dialog.onclose = async () => {
      const token = $("token").value;
      try {
        await call("/v1/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
        $("token").value = "";
        asking = null;
        resolve();
      } catch (error) {
        $("login-error").textContent = error.message;
        dialog.showModal();
      }
    };
  });
  return asking;
}

function chosenTask() {
  const chosen = [...document.querySelectorAll("#tasks input:checked")].map((box) => box.value);
  return chosen.find((name) => name === "auto" || name === TRY) ?? chosen.join("+");
}

function addTask(name, checked) {
  const label = document.createElement("label");
  label.className = "task";
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked });
  const isAlone = (value) => value === "auto" || value === TRY;
  box.addEventListener("change", () => {
    for (const other of document.querySelectorAll("#tasks input"))
      if (box.checked && other !== box && (isAlone(name) || isAlone(other.value))) other.checked = false;
    if (!chosenTask()) document.querySelector("#tasks input[value=auto]").checked = true;
  });
  const text = Object.assign(document.createElement("span"), { textContent: name });
  label.append(box, text);
  $("tasks").append(label);
}

function settings() {
  const chosen = {};
  if ($("strength").value !== "1") chosen.strength = Number($("strength").value);
  if ($("steps").value) chosen.steps = Number($("steps").value);
  return chosen;
}

const toSend = []; // files, each with where it goes and with what it is asked for
let isSending = false;

function send(files) {
  const task = $("tasks").hidden ? undefined : chosenTask();
  const [path, request] = task === TRY ? ["/v1/sheets", settings()] : ["/v1/restorations", { task, ...settings() }];
  toSend.push(...files.map((file) => ({ file, path, request: JSON.stringify(request) })));
  $("problem").textContent = "";
  if (!isSending) sendAll();
}

async function sendAll() {
  isSending = true;
  const wrong = [];
  for (let next; (next = toSend.shift()); ) {
    const { file, path, request } = next;
    $("sending").textContent = `sending ${file.name}${toSend.length ? `, then ${toSend.length} more` : ""}`;
    const form = new FormData();
    form.append("request", request);
    form.append("files", file, file.name);
    try {
      heed(await call(path, { method: "POST", body: form }));
    } catch (error) {
      if (error.again) {
        toSend.unshift(next);
        $("sending").textContent = `${toSend.length} to send; waiting for room in the queue`;
        await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(error.again, 5)));
      } else wrong.push(error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`);
    }
    await refresh().catch(() => {});
  }
  isSending = false;
  $("sending").textContent = "";
  $("problem").textContent = wrong.slice(0, 5).join("; ") + (wrong.length > 5 ? `; and ${wrong.length - 5} more` : "");
}

function heed({ data }) {
  for (const { id } of data) {
    sent.add(id);
    const known = jobsNow.find((job) => job.id === id); // where a look at the queue was faster
    if (known?.status === "done" && isEmpty()) show(known);
  }
}

async function more(job, what, request) {
  const headers = { "Content-Type": "application/json" };
  heed(await call(`/v1/restorations/${job.id}/${what}`, { method: "POST", headers, body: JSON.stringify(request) }));
  close(); // so that the new one is shown when it is done
  await refresh();
}

function show(job) {
  const caption = `${job.name} · ${words(job)}`;
  if (job.object === "sheet") chooser(job, caption, (task) => safely(() => more(job, "again", { ...job.request, task })));
  else compare(job, caption);
}

function words(job) {
  if (job.object === "sheet" && job.status === "done") return `every task tried, choose one · ${job.note}`;
  const task = job.object === "sheet" ? TRY : (job.request.task ?? "");
  const left = job.seconds_left == null ? "" : `, ${Math.ceil(job.seconds_left)} s left`;
  const size = job.width ? `${job.width} × ${job.height}, ${job.bits} bit, ${job.seconds.toFixed(1)} s` : "";
  return {
    queued: `${task} · waits${job.ahead ? `, ${job.ahead} ahead` : ""}`,
    running: `${task} · ${job.step ?? "starting"}${left}`,
    done: [job.note ? "" : task, job.note, size, ...(job.warnings ?? [])].filter(Boolean).join(" · "),
    skipped: `left as it is: ${(job.note ?? "").split(";")[0]}; choose a task to repair it all the same`,
    failed: job.error ?? "failed",
    cancelled: `${task} · cancelled`,
  }[job.status];
}

function act(text, label, run) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => safely(run));
  return button;
}

const safely = (run) => run().catch((error) => ($("problem").textContent = error.message));

function acts(job) {
  const at = `/v1/restorations/${job.id}`;
  if (!OVER.includes(job.status)) return [act("Cancel", `Cancel ${job.name}`, () => call(`${at}/cancel`, { method: "POST" }).then(refresh))];
  const made = [];
  if (job.result) {
    const isSheet = job.object === "sheet";
    const look = async () => {
      show(job);
      $("viewer").scrollIntoView({ block: "nearest" });
      (isSheet ? document.querySelector("#sheet button") : $("wipe")).focus({ preventScroll: true });
    };
    made.push(isSheet ? act("Choose", `Choose a task for ${job.name}`, look) : act("Compare", `Compare ${job.name}`, look));
    const link = Object.assign(document.createElement("a"), { href: `${at}/result`, textContent: "Download", className: "button" });
    link.setAttribute("aria-label", `Download ${job.name}`);
    link.setAttribute("download", "");
    made.push(link);
  }
  if (job.object !== "sheet" && job.status !== "failed" && !$("tasks").hidden)
    made.push(act("Try tasks", `Try every task on ${job.name}`, () => more(job, "sheet", settings())));
  made.push(act("Remove", `Remove ${job.name}`, () => call(at, { method: "DELETE" }).then(refresh)));
  return made;
}

function put(job, before) {
  let row = rows.get(job.id);
  if (!row) {
    const item = document.createElement("li");
    row = { item, name: document.createElement("div"), what: document.createElement("div"), acts: document.createElement("div") };
    row.bar = Object.assign(document.createElement("progress"), { max: 1 });
    [row.name.className, row.what.className, row.acts.className] = ["name", "what", "acts"];
    row.name.textContent = job.name;
    row.bar.setAttribute("aria-label", `Progress of ${job.name}`);
    item.append(row.name, row.what, row.acts, row.bar);
    rows.set(job.id, row);
    $("jobs").insertBefore(item, before);
  }
  row.what.textContent = words(job);
  row.what.classList.toggle("wrong", job.status === "failed");
  row.bar.hidden = job.status !== "running";
  row.bar.value = job.progress;
  if (row.status !== job.status) {
    if (sent.has(job.id) && OVER.includes(job.status)) $("live").textContent = `${job.name}: ${job.status}`;
    if (sent.has(job.id) && job.status === "done" && isEmpty()) show(job);
    row.status = job.status;
    row.acts.replaceChildren(...acts(job));
  }
  return row.item;
}

let jobsNow = [];
async function refresh() {
  const { data } = await call("/v1/restorations?limit=500");
  jobsNow = data;
  const kept = new Set(data.map((job) => job.id));
  for (const [id, row] of rows) if (!kept.has(id)) { row.item.remove(); rows.delete(id); }
  let after = null;
  for (const job of [...data].reverse()) after = put(job, after);
  if (!isEmpty() && ![...kept].some(isShown)) close();
  $("empty").hidden = data.length > 0;
  $("download-all").disabled = !data.some((job) => job.result && job.object !== "sheet");
}

async function watch() {
  for (;;) {
    try {
      await refresh();
    } catch (error) {
      $("problem").textContent = error instanceof TypeError ? "the server does not answer; waiting for it" : error.message;
    }
    const busy = jobsNow.some((job) => !OVER.includes(job.status));
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 3000 : busy ? 400 : 1500));
  }
}

async function begin() {
  const { data: [model] } = await call("/v1/models");
  $("model").textContent = `model ${model.id}`;
  if (!model.tasks.length) $("tasks").hidden = true;
  const tasks = model.tasks.filter((name) => name !== "auto");
  if (model.tasks.length) addTask("auto", true);
  for (const name of model.tasks.length ? [...tasks, TRY] : []) addTask(name, false);

  $("strength").addEventListener("input", () => ($("strength-value").textContent = Number($("strength").value).toFixed(1)));
  beginViewer();
  for (const id of ["files", "folder"])
    $(id).addEventListener("change", async (event) => {
      const files = [...event.target.files].filter((file) => !file.name.startsWith("."));
      event.target.value = "";
      send(files);
    });
  $("folder-button").addEventListener("click", () => $("folder").click());
  $("ask").addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, async (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") send(await dropped(event.dataTransfer));
    });
  $("download-all").addEventListener("click", () => {
    Object.assign(document.createElement("a"), { href: "/v1/results.zip", download: "" }).click();
  });
  watch();
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const found = [];
  const walk = async (entry) => {
    if (entry.name.startsWith(".")) return;
    if (entry.isFile) found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else {
      const reader = entry.createReader();
      for (let some; (some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length; )
        for (const each of some) await walk(each);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}

begin().catch((error) => ($("problem").textContent = error.message));
