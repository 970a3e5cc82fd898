#!/usr/bin/env bash
# Checks the dashboards against Grafana's schema, as its package @grafana/schema types it. $1 is a cache outside the clone.
set -euo pipefail
cache=${1:?folder}/grafana-schema; root=$(cd "$(dirname "$0")/.." && pwd)
command -v npm >/dev/null || { echo "checking the dashboards against Grafana's schema needs npm (Node.js 20 or newer)"; exit 1; }
mkdir -p "$cache"
(cd "$cache" && npm install --silent --no-audit --no-fund --prefix "$cache" @grafana/schema@13.2.3 typescript@5.9.3 >/dev/null)
for board in overview topic; do
  cat > "$cache/$board.ts" <<EOD
import type { Dashboard } from "./node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen";
// enums as the strings they stand for in JSON
type Plain<T> = T extends string ? \`\${T}\` : T extends (infer U)[] ? Plain<U>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
export const board: Plain<Dashboard> = $(cat "$root/charts/weir/dashboards/$board.json");
EOD
done
(cd "$cache" && node_modules/.bin/tsc --noEmit --strict --skipLibCheck --moduleResolution bundler --module esnext --target es2022 overview.ts topic.ts)
echo "dashboards: as Grafana's schema has them"
