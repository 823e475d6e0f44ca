// The server's videos: the one on the stage, the queue, and the gallery. The server knows them all, so a reload,
// a crash or a closed laptop changes nothing.
import { cancel, getJson, remove } from "./api.js";
import { arrange, at, complain, el, passFocus } from "./dom.js";
import { duration, t } from "./strings.js";
import { showWarnings, warningText } from "./warnings.js";

const BUSY_MS = 3000;
const IDLE_MS = 15000;
const LOST_MS = 1500;
const PAGE = 24;
const isOpen = (video) => video.status === "queued" || video.status === "in_progress";
const short = (text) => (text.length > 60 ? `${text.slice(0, 57)}…` : text);

export class Jobs {
  #events = null;
  #followed = null;
  #timer = 0;
  #asked = 0;
  #said = -1;
  #cancelling = new Set();
  #cards = new Map();
  #rows = new Map();
  #limit = PAGE;
  #made = 0; // finished windows of the followed video
  online = true;

  constructor({ reuse, changed }) {
    Object.assign(this, { reuse, changed });
    at("run-cancel").onclick = () => this.#cancel(this.#followed);
    at("more").onclick = () => {
      this.#limit = Math.min(100, this.#limit + PAGE);
      this.refresh();
    };
    for (const name of ["ended", "error"]) at("player").addEventListener(name, () => this.#grow());
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    window.addEventListener("online", () => this.refresh());
  }

  // Asks the server for everything, and again after a while.
  async refresh() {
    clearTimeout(this.#timer);
    const asked = ++this.#asked;
    let wait = IDLE_MS;
    try {
      const { data, has_more: more } = await getJson(`/v1/videos?limit=${this.#limit}`);
      if (asked !== this.#asked) return;
      this.#connection(true);
      this.#draw(data, more);
      if (data.some(isOpen)) wait = BUSY_MS;
    } catch (problem) {
      if (asked !== this.#asked) return;
      this.#connection(!problem.offline, problem.message);
      wait = LOST_MS;
    }
    this.#timer = setTimeout(() => this.refresh(), wait);
  }

  // Puts a video on the stage.
  show(video) {
    complain("stage-problem");
    if (isOpen(video)) this.#follow(video);
    else {
      this.#unfollow();
      this.#play(`/v1/videos/${video.id}/content`, video.id, "done");
      at("player").play().catch(() => {});
    }
  }

  #connection(online, message = "") {
    const banner = at("offline");
    if (!online || message) {
      if (banner.textContent !== message) banner.textContent = message;
      banner.hidden = false;
    } else if (!banner.hidden) {
      banner.hidden = true;
      banner.textContent = "";
      if (!this.online) this.#again();
    }
    this.online = online;
  }

  // After the server came back.
  #again() {
    const id = this.#followed;
    this.#unfollow();
    this.#followed = id;
    this.changed();
  }

  #draw(videos, more) {
    const running = videos.find(({ status }) => status === "in_progress");
    const waiting = videos.filter(({ status }) => status === "queued").reverse();
    const followed = videos.find(({ id }) => id === this.#followed);
    const next = running ?? waiting[0];
    if (followed && !isOpen(followed)) this.#ended(followed);
    else if (followed && (isOpen(followed) === false || !next || next.id === followed.id)) this.#follow(followed);
    else if (next) this.#follow(next);
    else if (!followed) this.#unfollow();
    const rest = waiting.filter(({ id }) => id !== this.#followed);
    at("queue-card").hidden = !rest.length;
    arrange(at("queue"), this.#rows, rest, (video) => this.#queued(video));
    rest.forEach(({ id }, place) => {
      this.#rows.get(id).querySelector(".hint").textContent = ` ${t("queue_place", { place: place + 1 + (running ? 0 : 1) })}`;
    });
    const closed = videos.filter((video) => !isOpen(video));
    arrange(at("gallery"), this.#cards, closed, (video) => this.#card(video));
    at("gallery-empty").hidden = closed.length > 0;
    at("more").hidden = !more;
  }

  #queued(video) {
    return el("li", {}, el("span", {}, short(video.prompt), el("span", { className: "hint" })),
      el("button", { type: "button", "aria-label": t("cancel_named", { prompt: short(video.prompt) }), onclick: () => this.#cancel(video.id) }, t("cancel")));
  }

  #card(video) {
    const prompt = short(video.prompt);
    const done = video.status === "completed";
    const address = `/v1/videos/${video.id}/content`;
    const when = new Date(1000 * video.created_at).toLocaleString("en", { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hour12: false });
    const facts = done ? t("made", { seconds: duration(Number(video.seconds)), size: video.size.replace("x", " × "), when }) : when;
    const title = t(video.error?.code === "cancelled" ? "cancelled" : "failed");
    const picture = done
      ? el("button", { type: "button", className: "thumb", "aria-label": t("play_named", { prompt }), onclick: () => this.#playFromCard(video) },
        el("img", { src: `${address}?variant=thumbnail`, alt: "", loading: "lazy" }), el("span", { className: "triangle", "aria-hidden": "true" }))
      : el("div", { className: "thumb bad" }, title);
    const save = done && el("a", { className: "button", href: address, download: `${video.id}.mp4`, "aria-label": t("download_named", { prompt }) }, t("download"));
    const again = !video.remixed_from_video_id && el("button", { type: "button", "aria-label": t("again_named", { prompt }), onclick: () => this.reuse(video.id) }, t("again"));
    const trash = el("button", { type: "button", className: "danger", "aria-label": t("delete_named", { prompt }) }, t("delete"));
    trash.onclick = () => this.#delete(video.id, trash);
    return el("li", { id: video.id, className: "item" }, picture,
      el("div", { className: "about" }, el("p", { className: "item-prompt", title: video.prompt }, prompt), el("p", { className: "hint" }, facts),
        !done && video.error && video.error.code !== "cancelled" ? el("p", { className: "problem" }, video.error.message) : null,
        ...(video.warnings ?? []).map((each) => el("p", { className: "hint" }, warningText(each))),
        el("div", { className: "row" }, ...[save, again, trash].filter(Boolean))));
  }

  #playFromCard(video) {
    this.show(video);
    at("stage").scrollIntoView({ block: "nearest" });
    at("player").focus({ preventScroll: true });
  }

  async #delete(id, button) {
    if (button.dataset.sure !== "yes") {
      const name = button.getAttribute("aria-label");
      button.dataset.sure = "yes";
      button.textContent = t("delete_sure");
      button.removeAttribute("aria-label");
      button.focus(); // some browsers do not focus a button that is clicked
      button.onblur = () => {
        button.dataset.sure = "";
        button.textContent = t("delete");
        button.setAttribute("aria-label", name);
      };
      return;
    }
    try {
      await remove(id);
      passFocus(button, at("gallery-title"));
      if (at("player").dataset.id === id) this.#clearScreen();
    } catch (problem) {
      complain("stage-problem", problem.message);
    }
    this.refresh();
  }

  async #cancel(id) {
    const from = document.activeElement;
    this.#cancelling.add(id);
    try {
      const video = await cancel(id);
      if (isOpen(video)) {
        if (this.#followed === id) at("run-text").textContent = t("run_cancelling");
      } else {
        this.#cancelling.delete(id);
        if (video.error?.code === "cancelled") await remove(id); // it waited: there is nothing to keep
        if (video.status !== "completed" && this.#followed === id) {
          this.#unfollow();
          complain("stage-problem", t("cancelled"));
        }
      }
    } catch (problem) {
      this.#cancelling.delete(id);
      complain("stage-problem", problem.message);
    }
    passFocus(from, at("stage-title"));
    this.refresh();
  }

  #follow(video) {
    if (this.#followed !== video.id || !this.#events) {
      this.#unfollow();
      this.#followed = video.id;
      if (at("player").dataset.id !== video.id) this.#clearScreen();
      at("run").hidden = false;
      this.#listen(video.id);
    }
    this.#progress(video);
    showWarnings(at("run-warnings"), video.warnings ?? []);
    if (video.status === "queued") this.#askWorker();
  }

  #listen(id) {
    const events = (this.#events = new EventSource(`/v1/videos/${id}/events`));
    events.addEventListener("progress", (event) => this.#progress({ id, status: "in_progress", ...JSON.parse(event.data) }));
    events.addEventListener("status", () => this.refresh());
    events.onerror = () => {
      events.close();
      if (this.#events !== events) return;
      this.#events = null;
      setTimeout(() => this.refresh(), LOST_MS);
    };
  }

  // Why the followed video still waits.
  async #askWorker() {
    const { ready, problem } = await getJson("/page/worker").catch(() => ({ ready: true, problem: "" }));
    complain("stage-problem", problem ? t("worker_problem", { problem }) : "");
    if (!ready && at("run-text").textContent === t("run_queued")) at("run-text").textContent = t("run_starting");
  }

  #unfollow() {
    this.#events?.close();
    this.#events = this.#followed = null;
    this.#said = -1;
    this.#made = 0;
    at("run").hidden = true;
  }

  #progress(video) {
    if (video.id !== this.#followed) return;
    const { progress: percent, window: done, windows, step, steps, eta_seconds: eta } = video;
    const cancelling = this.#cancelling.has(video.id);
    const making = windows ? t("run_making", { window: Math.min(done + 1, windows), windows }) : t("run_loading");
    at("run-text").textContent = cancelling ? t("run_cancelling") : video.status === "queued" ? t("run_queued") : making;
    at("run-bar").value = percent;
    const left = eta === null || eta === undefined ? t("run_percent", { percent }) : t("run_left", { percent, time: duration(Math.max(1, eta)) });
    at("run-detail").textContent = windows ? `${left} · ${t("run_detail", { window: done, windows, step, steps })}` : "";
    at("run-cancel").disabled = cancelling;
    const tens = Math.floor(percent / 10);
    if (tens > this.#said) {
      this.#said = tens;
      at("run-live").textContent = t("run_live", { percent });
    }
    this.#made = done;
    this.#grow();
  }

  // Plays what is finished so far; at its end, what has been added since.
  #grow() {
    const player = at("player");
    const growing = player.dataset.state === "growing";
    if (!this.#followed || this.#made <= (growing ? Number(player.dataset.windows) : 0)) return;
    if (growing && !player.ended && !player.error) return;
    const begin = growing && !player.error ? player.currentTime : 0;
    this.#play(`/v1/videos/${this.#followed}/content?variant=partial&follow=false&windows=${this.#made}`, this.#followed, "growing");
    player.dataset.windows = this.#made;
    player.muted = true;
    player.currentTime = begin;
    player.play().catch(() => {});
  }

  #play(address, id, state) {
    const player = at("player");
    Object.assign(player.dataset, { id, state });
    player.src = address;
    player.muted = false;
    player.hidden = false;
    at("screen-empty").hidden = true;
  }

  #clearScreen() {
    const player = at("player");
    Object.assign(player.dataset, { id: "", state: "" });
    player.removeAttribute("src");
    player.load();
    player.hidden = true;
    at("screen-empty").hidden = false;
  }

  // The followed video is finished, failed or cancelled.
  #ended(video) {
    this.#unfollow();
    this.#cancelling.delete(video.id);
    if (video.status === "completed") {
      at("run-live").textContent = t("run_done");
      this.show(video);
    } else {
      this.#clearScreen();
      const cancelled = video.error?.code === "cancelled";
      complain("stage-problem", cancelled ? t("cancelled") : `${t("failed")}: ${video.error?.message ?? ""}`);
    }
    this.changed();
  }
}
