// The page of `ebr-engine serve`: sends files, shows the queue, compares. Names and errors are only ever set as text.

const $ = (id) => document.getElementById(id);
const CLIPS = [".mp4", ".m4v", ".mov", ".webm"];
const OVER = ["done", "skipped", "failed", "cancelled"];
const rows = new Map(); // id of a job → what stands in the list for it
const sent = new Set(); // ids of jobs that this page has sent
let shownJob = null;

async function call(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.status === 401 && path !== "/v1/session") {
    await login();
    return call(path, options);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
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
  return chosen.includes("auto") ? "auto" : chosen.join("+");
}

function addTask(name, checked) {
  const label = document.createElement("label");
  label.className = "task";
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked });
  box.addEventListener("change", () => {
    for (const other of document.querySelectorAll("#tasks input"))
      if (box.checked && (name === "auto") !== (other.value === "auto")) other.checked = false;
    if (!chosenTask()) document.querySelector("#tasks input[value=auto]").checked = true;
  });
  const text = Object.assign(document.createElement("span"), { textContent: name });
  label.append(box, text);
  $("tasks").append(label);
}

async function send(files) {
  $("problem").textContent = "";
  const request = {};
  if (!$("tasks").hidden) request.task = chosenTask();
  if ($("strength").value !== "1") request.strength = Number($("strength").value);
  if ($("steps").value) request.steps = Number($("steps").value);
  const wrong = [];
  for (const file of files) {
    const form = new FormData();
    form.append("request", JSON.stringify(request));
    form.append("files", file, file.name);
    try {
      const { data } = await call("/v1/restorations", { method: "POST", body: form });
      for (const job of data) sent.add(job.id);
    } catch (error) {
      wrong.push(error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`);
    }
    await refresh();
  }
  $("problem").textContent = wrong.slice(0, 5).join("; ") + (wrong.length > 5 ? `; and ${wrong.length - 5} more` : "");
}

function words(job) {
  const task = job.request.task ?? "";
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
  button.addEventListener("click", () => run().catch((error) => ($("problem").textContent = error.message)));
  return button;
}

function acts(job) {
  const at = `/v1/restorations/${job.id}`;
  if (!OVER.includes(job.status)) return [act("Cancel", `Cancel ${job.name}`, () => call(`${at}/cancel`, { method: "POST" }).then(refresh))];
  const made = [];
  if (job.result) {
    made.push(act("Compare", `Compare ${job.name}`, async () => { show(job); $("wipe").focus(); }));
    const link = Object.assign(document.createElement("a"), { href: `${at}/result`, textContent: "Download", className: "button" });
    link.setAttribute("aria-label", `Download ${job.name}`);
    link.setAttribute("download", "");
    made.push(link);
  }
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
    if (sent.has(job.id) && job.status === "done" && !shownJob) show(job);
    row.status = job.status;
    row.acts.replaceChildren(...acts(job));
  }
  return row.item;
}

function element(job, which, loaded) {
  const name = which === "source" ? job.source : job.result;
  const source = `/v1/restorations/${job.id}/view/${which}`;
  if (CLIPS.some((suffix) => name.endsWith(suffix))) {
    const clip = Object.assign(document.createElement("video"), { src: source, muted: true, loop: true, playsInline: true });
    clip.addEventListener("loadeddata", loaded);
    return clip;
  }
  const picture = Object.assign(document.createElement("img"), { src: source, alt: which === "source" ? "before" : "after" });
  picture.addEventListener("load", loaded);
  picture.addEventListener("error", () => ($("caption").textContent = `${job.name}: this browser cannot show it; download it`));
  return picture;
}

function show(job) {
  shownJob = job.id;
  $("viewer").hidden = false;
  $("caption").textContent = `${job.name} · ${words(job)}`;
  let waiting = 2;
  const loaded = () => {
    if (--waiting) return;
    const clips = [...document.querySelectorAll("#stage video")];
    for (const clip of clips) clip.currentTime = 0;
    for (const clip of clips) clip.play().catch(() => {});
  };
  $("after").replaceChildren(element(job, "result", loaded));
  $("before").replaceChildren(element(job, "source", loaded));
  const clips = [...document.querySelectorAll("#stage video")];
  if (clips.length === 2) // the first leads, the other follows
    clips[0].addEventListener("timeupdate", () => {
      if (Math.abs(clips[0].currentTime - clips[1].currentTime) > 0.05) clips[1].currentTime = clips[0].currentTime;
    });
}

let jobsNow = [];
async function refresh() {
  const { data } = await call("/v1/restorations?limit=500");
  jobsNow = data;
  const kept = new Set(data.map((job) => job.id));
  for (const [id, row] of rows) if (!kept.has(id)) { row.item.remove(); rows.delete(id); }
  let after = null;
  for (const job of [...data].reverse()) after = put(job, after);
  if (shownJob && !kept.has(shownJob)) { shownJob = null; $("viewer").hidden = true; }
  $("empty").hidden = data.length > 0;
  $("download-all").disabled = !data.some((job) => job.result);
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
  for (const name of tasks) addTask(name, false);

  $("strength").addEventListener("input", () => ($("strength-value").textContent = Number($("strength").value).toFixed(1)));
  $("wipe").addEventListener("input", () => $("stage").style.setProperty("--at", `${$("wipe").value}%`));
  for (const id of ["files", "folder"])
    $(id).addEventListener("change", async (event) => {
      const files = [...event.target.files].filter((file) => !file.name.startsWith("."));
      event.target.value = "";
      await send(files);
    });
  $("folder-button").addEventListener("click", () => $("folder").click());
  $("ask").addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, async (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") await send(await dropped(event.dataTransfer));
    });
  $("download-all").addEventListener("click", async () => {
    for (const job of jobsNow.filter((each) => each.result)) {
      const link = Object.assign(document.createElement("a"), { href: `/v1/restorations/${job.id}/result`, download: "" });
      link.click();
      await new Promise((resolve) => setTimeout(resolve, 300)); // browsers drop downloads that come all at once
    }
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
