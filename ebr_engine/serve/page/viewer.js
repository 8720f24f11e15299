// Shows a job's result: before and after with a line between them, or a sheet whose tiles can be chosen.

const $ = (id) => document.getElementById(id);
const CLIPS = [".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mpg"];
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let shown = null; // id of a job

export const isShown = (id) => shown === id;
export const isEmpty = () => shown === null;

export function close() {
  shown = null;
  $("viewer").hidden = true;
  for (const part of ["after", "before", "sheet"]) $(part).replaceChildren();
}

function open(job, caption, isSheet) {
  close();
  shown = job.id;
  $("viewer").hidden = false;
  $("caption").textContent = caption;
  $("stage").hidden = isSheet;
  $("sheet").hidden = !isSheet;
  $("pause").hidden = true;
}

function element(job, which, loaded) {
  const name = which === "source" ? job.source : job.result;
  const source = `/v1/restorations/${job.id}/view/${which}`;
  const failed = () => {
    if (shown === job.id) $("caption").textContent = `${job.name}: this browser cannot show it; download it`;
  };
  if (CLIPS.some((suffix) => name.endsWith(suffix))) {
    const clip = Object.assign(document.createElement("video"), { src: source, muted: true, loop: true, playsInline: true });
    clip.addEventListener("loadeddata", loaded);
    clip.addEventListener("error", failed);
    return clip;
  }
  const picture = Object.assign(document.createElement("img"), { src: source, alt: which === "source" ? "before" : "after" });
  picture.addEventListener("load", loaded);
  picture.addEventListener("error", failed);
  return picture;
}

/** Before and after of a job that has a result. */
export function compare(job, caption) {
  open(job, caption, false);
  let waiting = 2;
  const loaded = () => {
    if (--waiting) return;
    const clips = playing();
    for (const clip of clips) clip.currentTime = 0;
    $("pause").hidden = !clips.length;
    play(!calm.matches);
  };
  $("after").replaceChildren(element(job, "result", loaded));
  $("before").replaceChildren(element(job, "source", loaded));
  const clips = playing();
  if (clips.length === 2) // the first leads, the other follows
    clips[0].addEventListener("timeupdate", () => {
      if (Math.abs(clips[0].currentTime - clips[1].currentTime) > 0.05) clips[1].currentTime = clips[0].currentTime;
    });
}

const playing = () => [...document.querySelectorAll("#stage video")];

function play(on) {
  for (const clip of playing()) on ? clip.play().catch(() => {}) : clip.pause();
  $("pause").textContent = on ? "Pause" : "Play";
}

/** A sheet's tiles as buttons over its picture; `choose(task)` hears which one. */
export function chooser(job, caption, choose) {
  open(job, caption, true);
  const picture = Object.assign(document.createElement("img"), { src: `/v1/restorations/${job.id}/view/result` });
  picture.alt = `${job.name}, restored by every task`;
  const tiles = Object.assign(document.createElement("div"), { className: "tiles" });
  tiles.append(picture);
  for (const { task, probability, chosen, place } of job.tiles) {
    const [left, top, width, height] = place;
    const tile = Object.assign(document.createElement("button"), { type: "button", className: "tile" });
    const sure = probability == null ? "" : `, ${Math.round(100 * probability)} % sure`;
    tile.setAttribute("aria-label", `Restore ${job.name} with ${task}${sure}${chosen ? ", as auto would" : ""}`);
    tile.title = `Restore with ${task}`;
    const share = (part, whole) => `${(100 * part) / whole}%`;
    tile.style.left = share(left, job.width);
    tile.style.top = share(top, job.height);
    tile.style.width = share(width, job.width);
    tile.style.height = share(height, job.height);
    tile.addEventListener("click", () => choose(task));
    tiles.append(tile);
  }
  $("sheet").replaceChildren(tiles);
}

export function begin() {
  $("wipe").addEventListener("input", () => $("stage").style.setProperty("--at", `${$("wipe").value}%`));
  $("pause").addEventListener("click", () => play($("pause").textContent === "Play"));
}
