// Words as text and as SRT, with the rules of voxtral_client/subtitles.py.

const LINES = 2;
const COLUMNS = 42;
const SHORTEST = 1; // seconds
const LONGEST = 7;
const PAUSE = 0.6; // seconds of silence that end a cue

const textOf = (words) => words.map((word) => word.text).join("").trim();

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
  return word.start - cue.at(-1).end >= PAUSE || /[.!?…。！？]$/u.test(textOf(cue));
}

/** Lines of at most COLUMNS characters; a longer word is cut. */
function wrap(text) {
  const lines = [];
  for (const word of text.split(/\s+/u).flatMap((long) => long.match(/.{1,42}/gu) ?? [])) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + 1 + word.length <= COLUMNS) lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines;
}

/** SRT has no escapes: characters that players read as markup are replaced by similar ones. */
function escape(line) {
  return line.replace(/-->/g, "→").replace(/[<>{}]/g, (c) => ({ "<": "‹", ">": "›", "{": "(", "}": ")" })[c]);
}

function clock(seconds) {
  const ms = Math.round(seconds * 1000);
  const digits = (number, count) => String(Math.floor(number)).padStart(count, "0");
  const parts = [digits(ms / 3600000, 2), digits((ms / 60000) % 60, 2), digits((ms / 1000) % 60, 2)];
  return `${parts.join(":")},${digits(ms % 1000, 3)}`;
}
