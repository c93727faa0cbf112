// Figures as people read them: with their units, with thousands separators, times in their own zone.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

export const count = (number) => whole.format(number);

/** For the axes of charts: 1.2K, 3M. */
export const short = (number) => compact.format(number);

/** Something a second: a decimal where there is little of it. */
export const rate = (number) => (number > 0 && number < 10 ? tenths : whole).format(number);

/** Micro-dollars as dollars, small amounts with as many digits as they need. Null: nobody knows the price. */
export function dollars(micros) {
  if (micros === null || micros === undefined) return "no price";
  const amount = micros / 1e6;
  const digits = micros === 0 || Math.abs(amount) >= 1 ? 2 : Math.abs(amount) >= 0.01 ? 4 : 6;
  return new Intl.NumberFormat("en-US", {
    style: "currency",
    currency: "USD",
    minimumFractionDigits: 2,
    maximumFractionDigits: digits,
  }).format(amount);
}

/** A share of one: 0.5%, and never 0% of something that happened. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  return `${(share > 0 && share < 1 ? tenths : whole).format(share * 100)}%`;
}

export function milliseconds(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${whole.format(ms)} ms`;
  return ms < 60_000
    ? `${(ms / 1000).toFixed(2)} s`
    : `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = number < 1 ? 0 : Math.min(Math.floor(Math.log2(number) / 10), units.length - 1);
  return `${(step ? tenths : whole).format(number / 1024 ** step)} ${units[step]}`;
}

const day = new Intl.DateTimeFormat("en-US", { month: "short", day: "numeric" });
const clock = new Intl.DateTimeFormat("en-US", { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const moment = new Intl.DateTimeFormat("en-US", {
  month: "short",
  day: "numeric",
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hourCycle: "h23",
});
const date = new Intl.DateTimeFormat("en-US", { year: "numeric", month: "short", day: "numeric" });

export const dayOf = (seconds) => day.format(seconds * 1000);
export const clockOf = (seconds) => clock.format(seconds * 1000);

/** A moment in the reader's zone, with UTC in its title; `dateOnly` for what is known by its day. */
export function time(iso, dateOnly = false) {
  const element = document.createElement("time");
  element.dateTime = iso;
  element.title = `${new Date(iso).toISOString().replace("T", " ").slice(0, 19)} UTC`;
  element.textContent = (dateOnly ? date : moment).format(new Date(iso));
  return element;
}

/** Seconds that passed, roughly. */
export function age(seconds) {
  if (seconds < 120) return `${whole.format(seconds)} s`;
  if (seconds < 7200) return `${whole.format(seconds / 60)} min`;
  return seconds < 172_800 ? `${whole.format(seconds / 3600)} h` : `${whole.format(seconds / 86_400)} days`;
}
