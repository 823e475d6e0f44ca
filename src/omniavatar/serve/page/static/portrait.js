// The portrait: a file, a dropped file, the camera, or the example.
import { getFile } from "./api.js";
import { at, complain, onDrop } from "./dom.js";
import { t } from "./strings.js";

export class Portrait {
  #stream = null;
  #address = "";
  file = null;
  isExample = false;

  constructor(changed) {
    this.changed = changed;
    at("portrait-file").onchange = (event) => {
      const [file] = event.target.files;
      if (file) this.use(file);
      event.target.value = "";
    };
    onDrop(at("portrait-drop"), (file) => this.use(file));
    at("portrait-example").onclick = () => this.useExample();
    at("camera-open").onclick = () => this.#openCamera();
    at("camera-take").onclick = () => this.#take();
    at("camera-close").onclick = () => {
      this.#closeCamera();
      at("camera-open").focus();
    };
  }

  use(file, isExample = false) {
    this.#closeCamera();
    Object.assign(this, { file, isExample });
    URL.revokeObjectURL(this.#address);
    const image = at("portrait-image");
    this.#address = URL.createObjectURL(file);
    image.onload = () => this.#show(t("portrait_named", { name: file.name, width: image.naturalWidth, height: image.naturalHeight }), true);
    image.onerror = () => this.#show(t("portrait_unseen", { name: file.name }), false);
    image.src = this.#address;
    complain("portrait-problem", "", at("portrait-file"));
    this.changed();
  }

  async useExample() {
    try {
      this.use(await getFile("/page/example/portrait", "example.png", "image/png"), true);
    } catch (problem) {
      complain("portrait-problem", problem.message);
    }
  }

  #show(name, visible) {
    at("portrait-name").textContent = name;
    at("portrait-image").alt = t("portrait_alt");
    at("portrait-image").hidden = !visible;
    at("portrait-empty").hidden = visible;
  }

  async #openCamera() {
    complain("portrait-problem");
    try {
      this.#stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", width: { ideal: 1280 } } });
    } catch (error) {
      complain("portrait-problem", t("no_camera", { reason: error.message }));
      return;
    }
    at("camera").srcObject = this.#stream;
    await at("camera").play();
    this.#buttons(true);
    at("camera-take").focus();
  }

  #take() {
    const video = at("camera");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      this.use(new File([blob], t("camera_name"), { type: "image/png" }));
      at("camera-open").focus();
    }, "image/png");
  }

  #closeCamera() {
    if (!this.#stream) return;
    for (const track of this.#stream.getTracks()) track.stop();
    this.#stream = null;
    at("camera").srcObject = null;
    this.#buttons(false);
  }

  #buttons(open) {
    for (const id of ["camera-take", "camera-close", "camera"]) at(id).hidden = !open;
    at("camera-open").hidden = open;
    at("portrait-face").classList.toggle("live", open);
  }
}
