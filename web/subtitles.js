// Words as text and as SRT, with the rules of voxtral_client/subtitles.py.

const LINES = 2;
const COLUMNS = 42;
const WIDER = 1.5; // columns more for a wide character: it is as wide as two, and read more slowly
const SHORTEST = 1; // seconds
const LONGEST = 7;
const PAUSE = 0.6; // seconds of silence that end a cue
const SENTENCE_END = /[.!?…。．！？｡।॥؟۔]["'”’“‘»«›‹)\]」』）】]*$/u;

// What stays together in a line: a character of Chinese or Japanese with its punctuation, or what spaces separate.
const UNSPACED = "\\u2e80-\\u30ff\\u31f0-\\ua4cf\\uf900-\\ufaff\\ufe30-\\ufe4f\\uff00-\\uff60\\u{20000}-\\u{3fffd}";
const BEHIND = "[、。，．！？：；…ー々っッゃゅょャュョ」』）】》〉”’)]*";
const PIECE = new RegExp(`\\s*(?:[「『（【《〈“‘(]*[${UNSPACED}]${BEHIND}|[^\\s${UNSPACED}]+)`, "gu");
const WIDE = new RegExp(`[${UNSPACED}\\u1100-\\u115f\\uac00-\\ud7a3\\uffe0-\\uffe6]`, "gu");
const APART = new RegExp(`[^\\s${UNSPACED}]$`, "u");

/** The space that is missing between two texts, if one is. */
export function joint(before = "", after = "") {
  const apart = [before, [...after][0] ?? ""].every((text) => APART.test(text));
  return apart ? " " : "";
}

const textOf = (words) => words.map((word) => word.text).join("").trim();
const width = (text) => [...text].length + WIDER * (text.match(WIDE)?.length ?? 0);

/** Plain text; a word with `fresh` begins a new line. */
export function plain(words) {
  return words.map(({ text, fresh }) => (fresh ? `\n${text.trimStart()}` : text)).join("").trim();
}

/** SubRip. */
export function srt(words) {
  const cues = [];
  for (const word of words) {
    if (!cues.length || endsBefore(cues.at(-1), word)) cues.push([]);
    cues.at(-1).push(word);
  }
  return cues.map((cue, i) => {
    const start = cue[0].start;
    const gone = cues[i + 1]?.[0].start ?? Infinity;
    const end = Math.min(Math.max(cue.at(-1).end, start + SHORTEST), gone);
    return `${i + 1}\n${clock(start)} --> ${clock(end)}\n${wrap(textOf(cue)).map(escape).join("\n")}\n\n`;
  }).join("");
}

function endsBefore(cue, word) {
  if (word.end - cue[0].start > LONGEST || wrap(textOf([...cue, word])).length > LINES) return true;
  if (word.start - cue[0].start < SHORTEST) return false;
  return word.start - cue.at(-1).end >= PAUSE || SENTENCE_END.test(textOf(cue));
}

/** Lines that are not too wide; a longer word is cut. */
function wrap(text) {
  const lines = [""];
  for (const piece of text.replace(/\s+/gu, " ").match(PIECE) ?? []) {
    const fits = width(lines.at(-1) + piece) <= COLUMNS || !lines.at(-1);
    if (!fits) lines.push("");
    for (const character of fits ? piece : piece.trimStart()) {
      if (width(lines.at(-1) + character) > COLUMNS) lines.push("");
      lines.push(lines.pop() + character);
    }
  }
  return lines;
}

/** SRT has no escapes: characters that players read as markup are replaced by similar ones. */
function escape(line) {
  return line.replace(/-->/g, "→").replace(/[<>{}]/g, (c) => ({ "<": "‹", ">": "›", "{": "(", "}": ")" })[c]);
}

/** HH:MM:SS,mmm */
export function clock(seconds) {
  const ms = Math.round(seconds * 1000);
  const digits = (number, count) => String(Math.floor(number)).padStart(count, "0");
  const parts = [digits(ms / 3600000, 2), digits((ms / 60000) % 60, 2), digits((ms / 1000) % 60, 2)];
  return `${parts.join(":")},${digits(ms % 1000, 3)}`;
}
