// The microphone as blocks of PCM16, and its errors in words.

/** Why this page cannot use a microphone, or "". */
export function obstacle() {
  if (!isSecureContext) {
    return "This page came over plain http from another machine. Browsers give such pages no microphone. Give the "
      + "server a certificate and open the page with https:// (docs/captions.md). On the server itself, "
      + `http://localhost:${location.port || 80}${location.pathname} works without one.`;
  }
  if (navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode) return "";
  return "This browser cannot record sound: update it.";
}

/** The microphones: [{deviceId, label}]. Labels are empty until the user has allowed the microphone. */
export async function microphones() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  return devices.filter(({ kind, deviceId }) => kind === "audioinput" && deviceId);
}

/** An exception of `Microphone.open` in words. */
export function explain(error) {
  switch (error.name) {
    case "NotAllowedError":
      return "The browser blocks the microphone for this page: allow it next to the address.";
    case "NotFoundError":
    case "OverconstrainedError":
      return "No microphone was found.";
    case "NotReadableError":
      return "Another program uses the microphone, or the system blocks it.";
    default:
      return `The microphone cannot be used (${error.message || error.name}).`;
  }
}

const contexts = new Map();

/**
 * The AudioContext with its worklet, at 16 kHz or at the device's own rate. The page keeps both: while the server is
 * away, it could not fetch the code of the worklet again.
 */
function context(options) {
  const rate = options?.sampleRate;
  if (!contexts.has(rate)) {
    const loaded = load(options);
    contexts.set(rate, loaded);
    loaded.catch(() => contexts.delete(rate));
  }
  return contexts.get(rate);
}

async function load(options) {
  const made = new AudioContext(options);
  try {
    await made.audioWorklet.addModule(new URL("recorder.js", import.meta.url));
    return made;
  } catch (error) {
    await made.close();
    throw error;
  }
}

const OURS = { sampleRate: 16000, latencyHint: "interactive" };

/** Fetch the code that `Microphone.open` needs, while the server answers. */
export function prepare() { context(OURS).catch(() => {}); }

/** `on.audio(samples, level)`: an Int16Array of 80 ms at 16 kHz, its level in dB. `on.gone()`: it was unplugged. */
export class Microphone {
  #stream = null;
  #nodes = null; // {context, source, recorder}
  #turn = 0; // counts `open` and `close`: an earlier `open` that is still waiting gives up

  constructor(on) { this.on = on; }

  /**
   * Use this microphone in place of any other; `deviceId` "" is the system's choice. Returns false if another `open` or
   * `close` came meanwhile. Throws what `explain` explains.
   */
  async open(deviceId) {
    this.close();
    const turn = this.#turn;
    // The sound processing that browsers use for calls makes recognition worse.
    const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    if (deviceId) audio.deviceId = { exact: deviceId };
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio });
      if (turn !== this.#turn) {
        stop(stream);
        return false;
      }
      this.#stream = stream;
      let used = await context(OURS);
      let source;
      try {
        source = used.createMediaStreamSource(stream);
      } catch (error) {
        if (error.name !== "NotSupportedError") throw error;
        used = await context(); // older Firefox: only the device's own rate (bugzilla 1674892)
        source = used.createMediaStreamSource(stream);
      }
      await used.resume();
      if (turn !== this.#turn) {
        if (!this.#stream) used.suspend().catch(() => {});
        return false;
      }
      this.#listen(used, source);
      return true;
    } catch (error) {
      if (turn !== this.#turn) return false;
      this.close();
      throw error;
    }
  }

  #listen(used, source) {
    const recorder = new AudioWorkletNode(used, "recorder", { numberOfOutputs: 0 });
    recorder.port.onmessage = ({ data }) => this.on.audio(data.samples, data.level);
    source.connect(recorder);
    // A call on a phone suspends it, for example.
    used.onstatechange = () => { if (used.state !== "running") used.resume().catch(() => {}); };
    this.#stream.getAudioTracks()[0].onended = () => this.on.gone();
    this.#nodes = { context: used, source, recorder };
  }

  close() {
    this.#turn++;
    if (this.#stream) stop(this.#stream);
    this.#stream = null;
    if (!this.#nodes) return;
    const { context: used, source, recorder } = this.#nodes;
    this.#nodes = null;
    source.disconnect();
    recorder.port.onmessage = null;
    recorder.port.postMessage("end");
    used.onstatechange = null;
    used.suspend().catch(() => {});
  }
}

function stop(stream) {
  stream.getTracks().forEach((track) => { track.onended = null; track.stop(); });
}
